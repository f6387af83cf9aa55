#!/usr/bin/env bash
# COCO 2017, or the small built-in sample set, in the layout that --data_path of every model reads.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/common/download.sh"

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
    has_sum "md5:$md5" "$zip" || download "$url/$archive" "$zip" "md5:$md5" \
        "or set COCO_URL to another mirror"
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
