# Sourced: `simulate_npu 2.13` makes .venv-npu-2.13 beside .venv, once, with torch and torch_npu as
# in requirements-2.13.txt, and sets NPU_TESTS to the command that runs Python on the simulated NPU.
# PYTHON is the interpreter that the other tests run on.
#
# Where the environment cannot be had, NPU_TESTS is that interpreter and SIMULATED_NPU_MISSING says
# why: the tests in this folder skip with it.

simulate_npu() {
    local here root pins venv libraries missing=
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    root=$(cd "$here/../.." && pwd)
    pins=$here/requirements-$1.txt
    venv=$root/.venv-npu-$1
    libraries=$venv/simulated_npu
    if _npu_environment && _npu_libraries; then
        # The task queue launches kernels from a second thread: host kernels would run beside it.
        NPU_TESTS=(env -u ASCEND_HOME_PATH SIMULATED_NPU=1 TASK_QUEUE_ENABLE=0
            TORCH_NPU_FALLBACK_CPU_DISABLE=1 TORCH_DEVICE_BACKEND_AUTOLOAD=0
            "LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
            "PYTHON=$venv/bin/python" "$venv/bin/python")
    else
        missing="torch_npu $1: $missing"
        NPU_TESTS=(env "SIMULATED_NPU_MISSING=$missing" "$PYTHON")
        echo "simulated NPU, $missing" >&2
    fi
}

_npu_environment() {
    local want torch pip uv
    want=$(cat "$root"/requirements*.txt "$here/requirements.txt" "$pins" | cksum)
    [ "$(cat "$venv/.installed" 2>/dev/null)" = "$want" ] && return 0
    echo "making $venv for the tests on the simulated NPU"
    rm -rf "$venv"
    "$PYTHON" -m venv "$venv" || { missing="$PYTHON -m venv fails"; return 1; }
    pip=("$venv/bin/python" -m pip --quiet --retries 1)
    uv=("$venv/bin/python" -m uv pip install --quiet --python "$venv/bin/python")
    "${pip[@]}" install uv || { missing="pip cannot install uv"; return 1; }
    torch=$(sed -n 's/^torch==//p' "$pins")
    # pip finds the CPU build where it is configured to, uv knows PyTorch's index of CPU builds.
    "${pip[@]}" install "torch==$torch+cpu" 2>/dev/null \
        || "${uv[@]}" --torch-backend cpu "torch==$torch" 2>/dev/null \
        || _npu_disguised_torch \
        || { missing="no build of torch $torch that it runs beside can be installed"; return 1; }
    # --no-deps: the wheels ask for the CPU build by its name.
    "${uv[@]}" --no-deps -r "$pins" || { missing="no wheel of it for this Python"; return 1; }
    "${uv[@]}" -r "$here/requirements.txt" -c <(grep -v '^torch' "$root/requirements.txt") \
        -c "$root/requirements-dev.txt" || { missing="a package cannot be installed"; return 1; }
    echo "$want" > "$venv/.installed"
}

# The package registry's build, for CUDA, with the name of its CUDA taken out. It finds no CUDA device
# here. torch_npu runs beside it up to 2.7; a later one would abort the process.
_npu_disguised_torch() {
    case $torch in 2.6.* | 2.7.*) ;; *) return 1 ;; esac
    "${uv[@]}" "torch==$torch" || return 1
    sed -i 's/^cuda: .*/cuda: Optional[str] = None/' "$venv"/lib/python*/site-packages/torch/version.py
}

_npu_libraries() {
    local want
    command -v g++ >/dev/null || { missing="g++ is not installed"; return 1; }
    want=$(cat "$here"/build.sh "$here"/*.cpp "$here"/cann/* "$venv/.installed" | cksum)
    [ "$(cat "$libraries/.built" 2>/dev/null)" = "$want" ] && return 0
    echo "building the fake CANN and the host kernels"
    bash "$here/build.sh" "$venv/bin/python" "$libraries" \
        || { missing="the fake CANN does not build"; return 1; }
    echo "$want" > "$libraries/.built"
}
