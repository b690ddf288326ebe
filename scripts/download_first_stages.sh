#!/usr/bin/env bash
# Download the released first stages into models/first_stage_models/: bash scripts/download_first_stages.sh [NAME...]
source "$(dirname "${BASH_SOURCE[0]}")/archives.sh"

main_with "released first stages" \
    kl-f4=first_stage_models/kl-f4 \
    kl-f8=first_stage_models/kl-f8 \
    kl-f16=first_stage_models/kl-f16 \
    kl-f32=first_stage_models/kl-f32 \
    vq-f4=first_stage_models/vq-f4 \
    vq-f4-noattn=first_stage_models/vq-f4-noattn \
    vq-f8=first_stage_models/vq-f8 \
    vq-f8-n256=first_stage_models/vq-f8-n256 \
    vq-f16=first_stage_models/vq-f16 \
    -- "$@"
