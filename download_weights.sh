#!/usr/bin/env bash
# Published weights: ImageNet backbones to train from, and detectors to evaluate and to finetune.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/common/download.sh"

usage() {
    cat <<'TEXT'
Usage: bash download_weights.sh MODEL [NAME [DIR]]

MODEL is ssd_mmdet, ssd_resnet34, ssd_resnet34/tfrecord, m2det or fcos. Without a NAME the weights
of the model are listed: what each is for, the AP that its publisher states, and its address. With
a NAME they are downloaded into DIR (default: weights), and the command that uses them is printed.

An interrupted download goes on where it stopped when the same command is given again. A file is
checked against the sha256 of its publisher, which may be the first eight digits in its name, and
is not downloaded again once it is complete. A file that does not fit is renamed to *.bad.

Environment: WEIGHTS_URL     a mirror instead of the publishers' hosts; the paths stay
             WEIGHTS_SHA256  the sha256 to expect instead, for a file that was published anew
             PYTHON          the interpreter where there is no .venv, curl or wget (default: python3)
TEXT
}

# A line is: MODEL NAME FLAG RECIPE SUM ADDRESS WORDS..., where - is none. FLAG is the one that takes
# the file. The lines of one NAME are the files of one checkpoint.
#
# Addresses: the READMEs and metafiles of MMDetection's configs/fcos and configs/ssd, mmcv's
# open_mmlab.json, torchvision, the READMEs of the ports and of Ascend's model zoo. torchvision and
# OpenMMLab put the first digits of the sum into the name; that of vgg16_reducedfc.pth is of a copy in
# a public repository.
table() {
    local mmdet=https://download.openmmlab.com/mmdetection/v2.0
    local backbones=https://download.openmmlab.com/pretrain/third_party
    local torchvision=https://download.pytorch.org/models
    local ascend=https://ascend-repo-modelzoo.obs.cn-east-2.myhuaweicloud.com/model/1_PyTorch_PTH
    local tensorflow=https://storage.googleapis.com/tf-perf-public/resnet34_ssd_checkpoint
    local tricks=fcos_center-normbbox-centeronreg-giou_r50_caffe_fpn_gn-head_1x_coco
    local ms=mstrain_640-800_2x_coco
    cat <<TABLE
ssd_mmdet vgg16_caffe --pretrained - sha256:292e1171 $backbones/vgg16_caffe-292e1171.pth ImageNet, for all recipes
ssd_mmdet ssd300 --checkpoint_path - sha256:d231a06e $mmdet/ssd/ssd300_coco/ssd300_coco_20210803_015428-d231a06e.pth AP 25.5: SSD300 of MMDetection 2.14 and later
ssd_mmdet ssd512 --checkpoint_path - sha256:0a47a1ca $mmdet/ssd/ssd512_coco/ssd512_coco_20210803_022849-0a47a1ca.pth AP 29.5: SSD512 of MMDetection 2.14 and later
ssd_mmdet ssd300_2020 --checkpoint_path - sha256:a92d2092 $mmdet/ssd/ssd300_coco/ssd300_coco_20200307-a92d2092.pth AP 25.6: SSD300 of MMDetection before 2.14
ssd_mmdet ssd512_2020 --checkpoint_path - sha256:038c5591 $mmdet/ssd/ssd512_coco/ssd512_coco_20200308-038c5591.pth AP 29.4: SSD512 of MMDetection before 2.14
ssd_resnet34 resnet34 --pretrained - sha256:333f7ec4c6338da2cbed37f1fc0445f9624f1355633fa1d7eab79a91084c6cef $torchvision/resnet34-333f7ec4.pth ImageNet, for the recipes 1p and 8p
ssd_resnet34 ascend --checkpoint_path - - $ascend/SSD-Resnet34/PTH/iter_183250.pt AP 23: trained with MLPerf's code, from Ascend's model zoo
ssd_resnet34/tfrecord resnet34_tensorflow --resnet_checkpoint - - $tensorflow/model.ckpt-28152.data-00000-of-00001 ImageNet, of MLPerf's TensorFlow code; two files
ssd_resnet34/tfrecord resnet34_tensorflow --resnet_checkpoint - - $tensorflow/model.ckpt-28152.index ImageNet, of MLPerf's TensorFlow code; two files
ssd_resnet34/tfrecord resnet34 --resnet_checkpoint - sha256:333f7ec4c6338da2cbed37f1fc0445f9624f1355633fa1d7eab79a91084c6cef $torchvision/resnet34-333f7ec4.pth ImageNet, torchvision's, trained with other padding
m2det vgg16_reducedfc --pretrained - sha256:633cb3a85c60f76737114bf41c8f8a7c8d23cc1215e4b44812fb068a09022d5f https://s3.amazonaws.com/amdegroot-models/vgg16_reducedfc.pth ImageNet, for the recipes with VGG-16
m2det resnet101 --pretrained 320_resnet101 sha256:5d3b4d8f $torchvision/resnet101-5d3b4d8f.pth ImageNet, for the recipe 320_resnet101
m2det 512_vgg --checkpoint_path - - $ascend/M2Det/PTH/m2det512_vgg.pth AP 37.8: the authors' only detector, from Ascend's model zoo
fcos resnet50_caffe --pretrained - sha256:788b5fa3 $backbones/resnet50_caffe-788b5fa3.pth ImageNet, for the recipes with ResNet-50 but tricks
fcos resnet50_msra --pretrained tricks sha256:5891d200 $backbones/resnet50_msra-5891d200.pth ImageNet, for the recipe tricks
fcos resnet101_caffe --pretrained r101_gn sha256:3ad79236 $backbones/resnet101_caffe-3ad79236.pth ImageNet, for the recipes with ResNet-101
fcos gn --checkpoint_path - sha256:821213aa $mmdet/fcos/fcos_r50_caffe_fpn_gn-head_1x_coco/fcos_r50_caffe_fpn_gn-head_1x_coco-821213aa.pth AP 36.6: recipe gn
fcos nogn --checkpoint_path - sha256:c229552f $mmdet/fcos/fcos_r50_caffe_fpn_4x4_1x_coco/fcos_r50_caffe_fpn_1x_4gpu_20200218-c229552f.pth AP 36.2: recipe nogn
fcos gn_2x --checkpoint_path - sha256:8ceb5c76 $mmdet/fcos/fcos_r50_caffe_fpn_gn-head_4x4_2x_coco/fcos_r50_caffe_fpn_gn_2x_4gpu_20200218-8ceb5c76.pth AP 36.9: recipe gn_2x
fcos gn_mstrain_2x --checkpoint_path - sha256:d92ceeea $mmdet/fcos/fcos_r50_caffe_fpn_gn-head_$ms/fcos_r50_caffe_fpn_gn-head_$ms-d92ceeea.pth AP 38.5: recipe gn_mstrain_2x
fcos tricks --checkpoint_path - sha256:0a0d75a8 $mmdet/fcos/$tricks/$tricks-0a0d75a8.pth AP 38.7: recipe tricks
fcos r101_gn --checkpoint_path - sha256:0e37b982 $mmdet/fcos/fcos_r101_caffe_fpn_gn-head_1x_coco/fcos_r101_caffe_fpn_gn-head_1x_coco-0e37b982.pth AP 39.1: recipe r101_gn
fcos r101_gn_2x --checkpoint_path - sha256:d2261033 $mmdet/fcos/fcos_r101_caffe_fpn_gn-head_4x4_2x_coco/fcos_r101_caffe_fpn_gn_2x_4gpu_20200218-d2261033.pth AP 39.1: recipe r101_gn_2x
fcos r101_gn_mstrain_2x --checkpoint_path - sha256:511424d6 $mmdet/fcos/fcos_r101_caffe_fpn_gn-head_$ms/fcos_r101_caffe_fpn_gn-head_$ms-511424d6.pth AP 40.8: recipe r101_gn_mstrain_2x
TABLE
}

# What of a model has no address that a program can download from.
elsewhere() {
    case $1 in
        m2det)
            echo "512_vgg is also in cloud folders of its authors, which only a browser reads:"
            echo "    https://github.com/qijiezhao/M2Det, section Pre-trained Files"
            ;;
    esac
    [ "$1" != ssd_resnet34 ] || return 0
    echo "The Ascend port names no address of a detector that it trained; its page:"
    case $1 in
        ssd_resnet34/tfrecord) echo "    https://gitee.com/ascend/ModelZoo-TensorFlow" ;;
        *) echo "    https://gitee.com/ascend/ModelZoo-PyTorch" ;;
    esac
}

# Prints the lines of the table for the model $1 and the name $2 (default: all names), without $1.
lines_of() {
    local model name rest
    table | while read -r model name rest; do
        if [ "$model" = "$1" ] && [ "$name" = "${2:-$name}" ]; then echo "$name $rest"; fi
    done
}

list() {
    local name flag recipe sum address words
    echo "Weights of $1: bash download_weights.sh $1 NAME [DIR]"
    echo "ImageNet: to train from. AP: a detector, with the AP on COCO val2017 that its publisher states."
    echo
    lines_of "$1" | while read -r name flag recipe sum address words; do
        printf '%-20s %s\n%-20s %s\n' "$name" "$words" '' "$address"
    done
    elsewhere "$1"
}

# Leaves the file of the address $1 with the sum $2 at $3.
provide() {
    local address=$1 sum=$2 file=$3 url=$1
    if [ -n "${WEIGHTS_URL:-}" ]; then
        url=${address#*://}
        url=${WEIGHTS_URL%/}/${url#*/}
    fi
    if has_sum "$sum" "$file"; then
        echo "${file##*/}: complete"
        return
    fi
    if [ -e "$file" ]; then
        mv -f "$file" "$file.bad"
        echo "$file: wrong sha256 sum, renamed to $file.bad"
    fi
    download "$url" "$file" "$sum" "or accept it by its sum: WEIGHTS_SHA256=DIGITS"
    if [ -z "$sum" ]; then
        echo "${file##*/}: sha256 $(sum_of sha256 "$file"); its publisher states none to check"
    fi
}

# Prints the command that uses the file $4 of the model $1 by the flag $2, with the recipe $3.
next_command() {
    local model=$1 flag=$2 recipe=$3 file=$4 script
    case $flag in
        --pretrained) script=$model/test/train_full_8p.sh ;;
        --checkpoint_path) script=$model/test/train_eval_8p.sh ;;
        --resnet_checkpoint)
            # Ranks run in folders of their own, and the paths of the data are in exec_main.sh.
            echo "bash $root/ssd_resnet34/run_npu_8p.sh $flag=${file%.index}"
            return
            ;;
    esac
    [ "$PWD" = "$root" ] || script=$root/$script
    [ "$recipe" = - ] && recipe='' || recipe=" --recipe=$recipe"
    echo "bash $script --data_path=coco$recipe $flag=$file"
}

for word in "$@"; do
    case $word in
        --help | -h) usage; exit ;;
        -*) die "unknown option $word; see bash download_weights.sh --help" ;;
    esac
done
case ${1:-} in
    ssd_mmdet | ssd_resnet34 | ssd_resnet34/tfrecord | m2det | fcos) model=$1 ;;
    '') die "no model named; see bash download_weights.sh --help" ;;
    *) die "unknown model $1: ssd_mmdet, ssd_resnet34, ssd_resnet34/tfrecord, m2det and fcos exist" ;;
esac
if [ $# -eq 1 ]; then
    list "$model"
    exit
fi
[ $# -le 3 ] || die "more than MODEL, NAME and DIR given; see bash download_weights.sh --help"
wanted=$2 folder=${3-weights}
[ -n "$folder" ] || die "the folder's name is empty; see bash download_weights.sh --help"
case $folder in /*) ;; *) folder=$PWD/$folder ;; esac

mapfile -t lines < <(lines_of "$model" "$wanted")
[ -n "$wanted" ] && [ ${#lines[@]} -gt 0 ] ||
    die "no weights $wanted of $model; bash download_weights.sh $model lists them"
[ ${#lines[@]} -eq 1 ] || [ -z "${WEIGHTS_SHA256:-}" ] ||
    die "WEIGHTS_SHA256 is for one file, and $wanted has ${#lines[@]}"

mkdir -p "$folder"
for line in "${lines[@]}"; do
    read -r name flag recipe sum address words <<<"$line"
    [ "$sum" = - ] && sum=''
    [ -z "${WEIGHTS_SHA256:-}" ] || sum=sha256:$WEIGHTS_SHA256
    file=$folder/${address##*/}
    provide "$address" "$sum" "$file"
done
echo "$words"
echo "next: $(next_command "$model" "$flag" "$recipe" "$file")"
