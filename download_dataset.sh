#!/usr/bin/env bash
# COCO 2017, or the small built-in sample set, in the layout that --data_path of every model reads.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: bash download_dataset.sh [--only=LIST] [--keep_zips] [DIR]
       bash download_dataset.sh --sample DIR

Downloads COCO 2017 into DIR (default: coco), the folder that --data_path wants:
    DIR/train2017/*.jpg    118,287 images, 18 GB
    DIR/val2017/*.jpg        5,000 images, 0.8 GB
    DIR/annotations/*.json  instances_train2017.json, instances_val2017.json and more, 0.8 GB
While a part is unpacked, its archive takes the same space once more.

  --only=LIST   some of train,val,annotations (evaluation needs val,annotations)
  --keep_zips   keep the archives in DIR/.download
  --sample DIR  no download: draw a set of 300 small images in the same layout
  --help        this text

An interrupted download goes on where it stopped when the same command is given again. Archives
are checked against their md5 sums. Parts that are complete are skipped, and a folder that this
script did not make is never touched.

Environment: COCO_URL  a mirror instead of http://images.cocodataset.org
             PYTHON    the interpreter where there is no .venv (default: python3; for --sample
                       a .venv is made, as quickstart.sh does)
TEXT
}

die() {
    echo "error: $*" >&2
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# Sets folder, archive and md5 of the part $1.
describe() {
    case $1 in
        train)
            folder=train2017 archive=zips/train2017.zip
            md5=${COCO_MD5_TRAIN:-cced6f7f71b7629ddf16f17bbcfab6b2} ;;
        val)
            folder=val2017 archive=zips/val2017.zip
            md5=${COCO_MD5_VAL:-442b8da7639aecaf257c1dceb8ba8c80} ;;
        annotations)
            folder=annotations archive=annotations/annotations_trainval2017.zip
            md5=${COCO_MD5_ANNOTATIONS:-f4bbac642086de4f52a3fdda2de5fa2c} ;;
        *) die "unknown part '$1' in --only: train, val and annotations exist" ;;
    esac
}

size_of() { if [ -f "$1" ]; then wc -c <"$1"; else echo 0; fi; }

# Downloads $1 to the file $2; tries again as long as a try brings more bytes.
fetch() {
    local before
    while before=$(size_of "$2") && ! fetch_rest "$1" "$2"; do
        [ "$(size_of "$2")" -gt "$before" ] || return 1
    done
}

# One try, beginning after the bytes that are already there.
fetch_rest() {
    if have curl; then
        local meter=--progress-bar
        [ -t 2 ] || meter=--silent
        curl --fail --location --show-error "$meter" --retry 5 --connect-timeout 30 \
            --speed-limit 1 --speed-time 60 --continue-at - --output "$2" "$1"
    elif have wget; then
        wget --no-verbose --tries=5 --timeout=60 --continue --output-document="$2" "$1"
    else
        "$python" - "$1" "$2" <<'PYTHON'
import os, shutil, sys, urllib.request

url, path = sys.argv[1:]
start = os.path.getsize(path) if os.path.exists(path) else 0
request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
try:
    with urllib.request.urlopen(request, timeout=60) as response:
        resumed = response.status == 206
        total = int(response.headers["Content-Length"]) + (start if resumed else 0)
        with open(path, "ab" if resumed else "wb") as file:
            shutil.copyfileobj(response, file, 1 << 20)
except OSError as error:
    sys.exit(f"{url}: {error}")
if os.path.getsize(path) != total:
    sys.exit(f"{url}: the connection broke")
PYTHON
    fi
}

has_md5() { [ -f "$1" ] && [ "$(md5sum <"$1" | cut -d ' ' -f 1)" = "$2" ]; }

# Leaves the checked archive of the described part at $1.
download() {
    has_md5 "$1" "$md5" && return
    local partial=$1.part
    echo "$folder: downloading $url/$archive"
    if ! fetch "$url/$archive" "$partial"; then
        # A server asked for what follows the last byte may well answer with an error.
        has_md5 "$partial" "$md5" || die "download of $url/$archive stopped;" \
            "give the same command again to go on, or delete $partial to begin anew"
    elif ! has_md5 "$partial" "$md5"; then
        mv -f "$partial" "$1.bad"
        die "wrong md5 sum of $url/$archive, kept as $1.bad (expected $md5);" \
            "give the same command again to download it anew, or set COCO_URL to another mirror"
    fi
    mv -f "$partial" "$1"
    rm -f "$1.bad"
}

unpack() {
    echo "$folder: unpacking"
    if have unzip; then unzip -q "$1" -d "$2"; else "$python" -m zipfile -e "$1" "$2"; fi
}

target=coco only=annotations,val,train keep_zips=false sample=false named=0
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage; exit ;;
        --only=*) only=${1#*=} ;;
        --keep_zips) keep_zips=true ;;
        --sample) sample=true ;;
        --sample=*) sample=true target=${1#*=} named=$((named + 1)) ;;
        -*) die "unknown option $1; see bash download_dataset.sh --help" ;;
        *) target=$1 named=$((named + 1)) ;;
    esac
    shift
done
[ "$named" -le 1 ] || die "more than one folder named; see bash download_dataset.sh --help"
[ -n "$target" ] || die "the folder's name is empty; see bash download_dataset.sh --help"
case $target in /*) ;; *) target=$PWD/$target ;; esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
[ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python

if $sample; then
    [ "$named" -eq 1 ] || die "--sample wants a folder: bash download_dataset.sh --sample DIR"
    cd "$root"
    if [ "$python" != "$root/.venv/bin/python" ]; then
        source common/npu/venv.sh
        find_python requirements.txt
        python=$PYTHON
    fi
    exec "$python" -m common.coco.sample "$target"
fi

url=${COCO_URL:-http://images.cocodataset.org}
work=$target/.download # archives, half-made folders and, for each part made here, PART.made
IFS=, read -r -a parts <<<"$only"
[ ${#parts[@]} -gt 0 ] || die "--only names no part: train, val and annotations exist"

for part in "${parts[@]}"; do # before any download
    describe "$part"
    if [ -e "$target/$folder" ] && [ ! -e "$work/$part.made" ]; then
        die "$target/$folder exists and was not made by this script;" \
            "move it away, name another folder, or leave the part out with --only"
    fi
done

mkdir -p "$work"
for part in "${parts[@]}"; do
    describe "$part"
    if [ -e "$target/$folder" ]; then
        echo "$folder: complete"
        continue
    fi
    zip=$work/${archive##*/} unpacked=$work/$part.unpacked
    download "$zip"
    rm -rf "$unpacked"
    mkdir "$unpacked"
    unpack "$zip" "$unpacked" || die "$zip could not be unpacked; is the disk full?"
    [ -d "$unpacked/$folder" ] || die "$zip holds no folder $folder; is COCO_URL right?"
    # The mark first: a folder without one would be taken for somebody else's.
    : >"$work/$part.made"
    mv "$unpacked/$folder" "$target/$folder"
    rm -rf "$unpacked"
    $keep_zips || rm -f "$zip"
    echo "$folder: complete"
done
echo "COCO 2017 ($only) is in $target: train and evaluate with --data_path=$target"
