# Sourced by download_models.sh and download_first_stages.sh: fetch, test, check and unpack archives of released weights.
#
# A download goes on where it stopped. An archive is tested as a whole and its SHA-256 is printed; where models/SHA256SUMS has a line for it,
# it is compared with that before anything is unpacked. The publisher gives no sums, so none are shipped: whoever has fetched an archive
# once and trusts it keeps the printed line there, and every later download is held to it. Files that are there already are kept.

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SOURCE=${LDM_DOWNLOADS:-https://ommer-lab.com/files/latent-diffusion} # a mirror may stand in
MODELS=${LDM_MODELS:-$ROOT/models}

fail() {
    echo "error: $*" >&2
    exit 2
}

need() {
    local tool
    for tool in "$@"; do
        command -v "$tool" >/dev/null || fail "$tool is not installed; it is needed here"
    done
}

sha256() {
    if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d ' ' -f 1
}

# checked ARCHIVE NAME: print the archive's SHA-256, and compare it where models/SHA256SUMS has a line "<sha256>  NAME".
checked() {
    local archive=$1 name=$2 sum expected=""
    sum=$(sha256 "$archive")
    echo "$sum  $name"
    if [ -f "$MODELS/SHA256SUMS" ]; then
        expected=$(awk -v name="$name" '{ sub(/\r$/, "") } $2 == name || $2 == "*" name { print tolower($1); exit }' "$MODELS/SHA256SUMS")
    fi
    if [ -z "$expected" ]; then
        echo "not compared: $MODELS/SHA256SUMS has no line for $name; the one above, put there, holds later downloads to this archive"
        return
    fi
    [ "$expected" = "$sum" ] || fail "$archive: models/SHA256SUMS has $expected for $name; delete the file and start again, or mend that line"
    echo "as in models/SHA256SUMS"
}

whole() {
    [ -f "$1" ] && unzip -tqq "$1" >/dev/null 2>&1
}

# fetch URL ARCHIVE: by way of ARCHIVE.part, from where that ends; it becomes ARCHIVE when it has been tested as a whole.
fetch() {
    local url=$1 part=$2.part code=0
    if ! whole "$part"; then
        echo "$url -> $2"
        curl --fail --location --retry 5 --continue-at - --output "$part" "$url" || code=$?
        # 33: the server sends no parts of files; 22 with a file at hand: there may be nothing after its end. Both: from the start.
        if [ $code = 33 ] || { [ $code = 22 ] && [ -s "$part" ]; }; then
            rm -f "$part"
            code=0
            curl --fail --location --retry 5 --output "$part" "$url" || code=$?
        fi
        [ $code = 0 ] || fail "$url could not be fetched as a whole (curl's error $code); run this again, and it goes on where it stopped"
        # A page of words in the place of an archive must not be gone on with the next time.
        whole "$part" || { rm -f "$part"; fail "$url is damaged or no archive; what came was deleted"; }
    fi
    mv "$part" "$2"
}

# get NAME FOLDER: <SOURCE>/NAME.zip into models/FOLDER.
get() {
    local name=$1 folder=$MODELS/$2 archive staging file target kept=0
    archive=$folder/$name.zip
    if compgen -G "$folder/*.ckpt" >/dev/null; then
        echo "$name: weights are in $folder already"
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
    compgen -G "$folder/*.ckpt" >/dev/null || fail "$archive holds no .ckpt"
    rm "$archive"
    echo "$name: $(cd "$folder" && ls -- *.ckpt) in $folder$([ $kept -gt 0 ] && echo ", $kept files that were there kept")"
}

# main_with WHAT NAME=FOLDER...: the command line of a script that offers these archives.
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
                echo "Fetch $what into models/, all of them or those named. A stopped download goes on where it was."
                echo "names: ${known[*]%%=*}"
                echo "sums: an archive is compared with its line in models/SHA256SUMS (\"<sha256>  NAME.zip\"), where you have put one"
                echo "environment: LDM_DOWNLOADS, a mirror of $SOURCE; LDM_MODELS, where to put them ($MODELS)"
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
