# Sourced: `simulate_npu` makes .venv-npu beside .venv, once, and sets NPU_TESTS to the command that
# runs Python on the simulated NPU. PYTHON is the interpreter that the other tests run on.
#
# Where the environment cannot be had, NPU_TESTS is that interpreter and SIMULATED_NPU_MISSING says
# why: the tests in this folder skip with it.

simulate_npu() {
    local here root venv libraries
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    root=$(cd "$here/../.." && pwd)
    venv=$root/.venv-npu
    libraries=$venv/simulated_npu
    if _npu_environment && _npu_libraries; then
        # The task queue launches kernels from a second thread: host kernels would run beside it.
        NPU_TESTS=(env -u ASCEND_HOME_PATH SIMULATED_NPU=1 TASK_QUEUE_ENABLE=0
            TORCH_NPU_FALLBACK_CPU_DISABLE=1 TORCH_DEVICE_BACKEND_AUTOLOAD=0
            "LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
            "PYTHON=$venv/bin/python" "$venv/bin/python")
    else
        NPU_TESTS=("$PYTHON")
        export SIMULATED_NPU_MISSING
        echo "simulated NPU: $SIMULATED_NPU_MISSING" >&2
    fi
}

_npu_environment() {
    local want torch pip uv
    want=$(cat "$root"/requirements*.txt "$here/requirements.txt" | cksum)
    [ "$(cat "$venv/.installed" 2>/dev/null)" = "$want" ] && return 0
    echo "making $venv for the tests on the simulated NPU"
    rm -rf "$venv"
    "$PYTHON" -m venv "$venv" || { SIMULATED_NPU_MISSING="$PYTHON -m venv fails"; return 1; }
    pip=("$venv/bin/python" -m pip --quiet --retries 1)
    uv=("$venv/bin/python" -m uv pip install --quiet --python "$venv/bin/python")
    "${pip[@]}" install uv || { SIMULATED_NPU_MISSING="pip cannot install uv"; return 1; }
    torch=$(sed -n 's/^torch==//p' "$root/requirements.txt")
    # pip finds the CPU build where it is configured to, uv knows PyTorch's index of CPU builds.
    "${pip[@]}" install "torch==$torch+cpu" 2>/dev/null \
        || "${uv[@]}" --torch-backend cpu "torch==$torch" \
        || { SIMULATED_NPU_MISSING="the CPU build of torch $torch cannot be installed"; return 1; }
    "${uv[@]}" -r "$here/requirements.txt" -c "$root/requirements.txt" \
        -c "$root/requirements-dev.txt" \
        || { SIMULATED_NPU_MISSING="torch-npu or another package cannot be installed"; return 1; }
    echo "$want" > "$venv/.installed"
}

_npu_libraries() {
    local want
    command -v g++ >/dev/null || { SIMULATED_NPU_MISSING="g++ is not installed"; return 1; }
    want=$(cat "$here"/build.sh "$here"/*.cpp "$here"/cann/* "$venv/.installed" | cksum)
    [ "$(cat "$libraries/.built" 2>/dev/null)" = "$want" ] && return 0
    echo "building the fake CANN and the host kernels"
    bash "$here/build.sh" "$venv/bin/python" "$libraries" \
        || { SIMULATED_NPU_MISSING="the fake CANN does not build"; return 1; }
    echo "$want" > "$libraries/.built"
}
