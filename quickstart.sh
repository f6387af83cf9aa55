#!/usr/bin/env bash
# From nothing to a trained detector: set up, draw the built-in sample set, train, evaluate, draw.
#
#   bash quickstart.sh                 everything into quickstart/, on the best device there is
#   PYTHON=python3 bash quickstart.sh  with your own interpreter (Ascend image), nothing installed
#
# Further flags go to ssd_resnet34/train.py, e.g. --device=cpu --epochs=5.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
export ONESTAGE_LAUNCH_TIME=$(date +%s)
source common/npu/venv.sh
find_python requirements.txt
source common/npu/env_npu.sh

[ -d quickstart/sample ] || "$PYTHON" -m common.coco.sample quickstart/sample --train 1200
"$PYTHON" ssd_resnet34/train.py --recipe=quickstart --data=quickstart/sample \
    --output_dir=quickstart/output "$@"

echo
echo "Look at:"
for file in detections.png curves.png pr_curves.png train_0.log; do
    [ -e "quickstart/output/$file" ] && echo "  quickstart/output/$file"
done
echo "Next: bash download_dataset.sh, then bash ssd_resnet34/test/train_full_1p.sh --data_path=coco"
