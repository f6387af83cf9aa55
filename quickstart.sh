#!/usr/bin/env bash
# From nothing to a trained detector: set up, draw the built-in sample set, train, evaluate, draw.
set -euo pipefail

usage() {
    cat <<'TEXT'
From nothing to a trained detector: set up, draw the built-in sample set, train, evaluate, draw.

  bash quickstart.sh                 everything into quickstart/, on the best device there is
  PYTHON=python3 bash quickstart.sh  with your own interpreter (Ascend image), nothing installed

Further flags go to ssd_resnet34/train.py, e.g. --device=cpu --epochs=5.
TEXT
}

case ${1:-} in
    --help | -h) usage && exit ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")"
export ONESTAGE_LAUNCH_TIME=$(date +%s)
source common/npu/venv.sh
find_python requirements.txt
source common/npu/env_npu.sh

[ -d quickstart/sample ] || "$PYTHON" -m common.coco.sample quickstart/sample --train 1200
"$PYTHON" ssd_resnet34/train.py --recipe=quickstart --data=quickstart/sample \
    --output_dir=quickstart/output "$@"

echo
echo "Look at:"
for file in report.html detections.png worst_images.png suspect_labels.png errors.png confusion.png \
    curves.png pr_curves.png train_0.log; do
    [ -e "quickstart/output/$file" ] && echo "  quickstart/output/$file"
done
echo "Next, detect in pictures, or train on COCO:"
echo "  ${PYTHON#"$PWD/"} ssd_resnet34/demo.py quickstart/sample/val2017 --checkpoint quickstart/output/best.pt"
echo "  bash download_dataset.sh coco && bash ssd_resnet34/test/train_full_1p.sh --data_path=coco"
