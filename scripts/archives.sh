# Sourced by download_models.sh and download_first_stages.sh: download, test, verify and unpack archives of released weights.
#
# Interrupted downloads are resumed. Each archive is tested and its SHA-256 is printed; if models/SHA256SUMS has a line for it,
# the two are compared before anything is unpacked. The publisher gives no checksums, so none are shipped: add the printed line
# of an archive that you trust, and later downloads are compared with it. Existing files are kept.

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SOURCE=${LDM_DOWNLOADS:-https://ommer-lab.com/files/latent-diffusion} # or a mirror
MODELS=${LDM_MODELS:-$ROOT/models}

fail() {
    echo "error: $*" >&2
    exit 2
}

need() {
    local tool
    for tool in "$@"; do
        command -v "$tool" >/dev/null || fail "$tool is required but not installed"
    done
}

sha256() {
    if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d ' ' -f 1
}

# checked ARCHIVE NAME: print the SHA-256 of the archive, and compare it with the line "<sha256>  NAME" of models/SHA256SUMS.
checked() {
    local archive=$1 name=$2 sum expected=""
    sum=$(sha256 "$archive")
    echo "$sum  $name"
    if [ -f "$MODELS/SHA256SUMS" ]; then
        expected=$(awk -v name="$name" '{ sub(/\r$/, "") } $2 == name || $2 == "*" name { print tolower($1); exit }' "$MODELS/SHA256SUMS")
    fi
    if [ -z "$expected" ]; then
        echo "not compared: $MODELS/SHA256SUMS has no line for $name; add the line above to verify later downloads"
        return
    fi
    [ "$expected" = "$sum" ] || fail "$archive: models/SHA256SUMS has $expected for $name; delete the file and download it again, or correct that line"
    echo "matches models/SHA256SUMS"
}

whole() {
    [ -f "$1" ] && unzip -tqq "$1" >/dev/null 2>&1
}

# fetch URL ARCHIVE: download to ARCHIVE.part, resuming it, and rename it to ARCHIVE once the whole file has been tested.
fetch() {
    local url=$1 part=$2.part code=0
    if ! whole "$part"; then
        echo "$url -> $2"
        curl --fail --location --retry 5 --continue-at - --output "$part" "$url" || code=$?
        # 33: the server does not support ranges; 22 with a partial file: maybe nothing is left to send. Start over in both cases.
        if [ $code = 33 ] || { [ $code = 22 ] && [ -s "$part" ]; }; then
            rm -f "$part"
            code=0
            curl --fail --location --retry 5 --output "$part" "$url" || code=$?
        fi
        [ $code = 0 ] || fail "$url: download incomplete (curl error $code); run this again to resume"
        # An error page instead of an archive must not be resumed the next time.
        whole "$part" || { rm -f "$part"; fail "$url: damaged or not an archive; the download was deleted"; }
    fi
    mv "$part" "$2"
}

# get NAME FOLDER: download <SOURCE>/NAME.zip and unpack it into models/FOLDER.
get() {
    local name=$1 folder=$MODELS/$2 archive staging file target kept=0
    archive=$folder/$name.zip
    if compgen -G "$folder/*.ckpt" >/dev/null; then
        echo "$name: $folder already has weights"
        return
    fi
    mkdir -p "$folder"
    whole "$archive" || fetch "$SOURCE/$name.zip" "$archive"
    checked "$archive" "$name.zip"
    staging=$(mktemp -d "$folder/.unpacking.XXXXXX")
    unzip -q "$archive" -d "$staging" || { rm -rf "$staging"; fail "$archive cannot be unpacked"; }
    while IFS= read -r -d '' file; do
        target=$folder/$(basename "$file")
        if [ -e "$target" ]; then kept=$((kept + 1)); else mv "$file" "$target"; fi
    done < <(find "$staging" -type f -print0)
    rm -rf "$staging"
    compgen -G "$folder/*.ckpt" >/dev/null || fail "$archive contains no .ckpt"
    rm "$archive"
    echo "$name: $(cd "$folder" && ls -- *.ckpt) in $folder$([ $kept -gt 0 ] && echo ", $kept existing files kept")"
}

# main_with WHAT NAME=FOLDER... -- ARGUMENTS...: the command line of a script for these archives.
main_with() {
    local what=$1 entry name wanted=() known=() found
    shift
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        known+=("$1")
        shift
    done
    shift
    for name in "$@"; do
        case $name in
            -h | --help)
                echo "usage: $(basename "$0") [--list] [NAME...]"
                echo "Download $what into models/: all of them, or the named ones. Interrupted downloads are resumed."
                echo "names: ${known[*]%%=*}"
                echo "checksums: if models/SHA256SUMS has a line \"<sha256>  NAME.zip\", the archive is compared with it"
                echo "environment: LDM_DOWNLOADS, a mirror of $SOURCE; LDM_MODELS, the target folder ($MODELS)"
                return
                ;;
            --list)
                for entry in "${known[@]}"; do echo "${entry%%=*} -> models/${entry#*=}/"; done
                return
                ;;
        esac
        found=""
        for entry in "${known[@]}"; do
            if [ "${entry%%=*}" = "$name" ]; then found=$entry; fi
        done
        [ -n "$found" ] || fail "$name: choose from ${known[*]%%=*}"
        wanted+=("$found")
    done
    need curl unzip
    for entry in "${wanted[@]:-${known[@]}}"; do
        get "${entry%%=*}" "${entry#*=}"
    done
}
