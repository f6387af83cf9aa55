#!/usr/bin/env bash
# Set up what the tests need, once, and run every test: bash run_tests.sh [pytest arguments]
set -euo pipefail

usage() {
    cat <<'TEXT'
Set up what the tests need, once, and run them: bash run_tests.sh [pytest arguments]

  bash run_tests.sh                          as CI does
  bash run_tests.sh --all                    these, and those that show the same once more: with
                                             other numbers of processes, for the other models,
                                             with torch_npu 2.7 and 2.6, and the pages in a
                                             browser (Debian's package chromium)
  bash run_tests.sh -m "not slow"            the quick ones
  bash run_tests.sh tests/common -k nms      some of them
  bash run_tests.sh tests/simulated_npu      those on the simulated Ascend NPU, which have an
                                             environment of their own (see the README there)

Environment: TEST_PROCESSES  test processes side by side (default: one a core)
             PYTHON          an interpreter that has everything; nothing is installed then
TEXT
}

# Tests open the pages in a real browser, which is no Python package.
find_browser() {
    local name
    for name in chromium chromium-browser google-chrome; do
        command -v "$name" >/dev/null && return
    done
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "run_tests.sh: installing chromium, in which tests open the pages"
        apt-get install -y -qq chromium >/dev/null 2>&1 && return
    fi
    echo "run_tests.sh: no chromium here: the tests that open the pages in a browser are skipped"
}

selection=(-m "not again")
npu_versions=(2.13)
case ${1:-} in
    --help | -h) usage && exit ;;
    --all)
        selection=()
        npu_versions+=(2.7 2.6)
        with_browser=1
        shift
        ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")"
source common/npu/venv.sh
source tests/simulated_npu/environment.sh
find_python requirements.txt requirements-dev.txt
[ -z "${with_browser:-}" ] || find_browser
export TORCH_DEVICE_BACKEND_AUTOLOAD=0 PYTHON
# One thread a test process, as many processes as cores: faster than threads on small tensors.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
options=(-n "${TEST_PROCESSES:-auto}" --dist worksteal --durations=15 "${selection[@]}")

parts="rest npu"
for word in "$@"; do
    case $word in
        tests/simulated_npu*) parts=npu ;;
        tests*) parts=rest ;;
    esac
done

status=0
if [ "$parts" != npu ]; then
    "$PYTHON" -m pytest "${options[@]}" --ignore=tests/simulated_npu "$@" || status=$?
fi
if [ "$parts" != rest ]; then
    [ "$parts" = npu ] || options+=(tests/simulated_npu)
    for version in "${npu_versions[@]}"; do
        simulate_npu "$version"
        short_set=()
        [ "$version" = 2.13 ] || short_set=(-m every_version)
        # 5: none of these tests was asked for.
        "${NPU_TESTS[@]}" -m pytest "${options[@]}" "$@" "${short_set[@]}" || [ $? = 5 ] || status=1
    done
fi
exit "$status"
