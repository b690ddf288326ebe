#!/usr/bin/env bash
# Download the released latent diffusion models into models/ldm/: bash scripts/download_models.sh [NAME...]
source "$(dirname "${BASH_SOURCE[0]}")/archives.sh"

main_with "released diffusion models" \
    celeba=ldm/celeba256 \
    ffhq=ldm/ffhq256 \
    lsun_churches=ldm/lsun_churches256 \
    lsun_bedrooms=ldm/lsun_beds256 \
    text2img=ldm/text2img256 \
    cin=ldm/cin256 \
    semantic_synthesis=ldm/semantic_synthesis512 \
    semantic_synthesis256=ldm/semantic_synthesis256 \
    sr_bsr=ldm/bsr_sr \
    layout2img_model=ldm/layout2img-openimages256 \
    inpainting_big=ldm/inpainting_big \
    -- "$@"
