# Sourced: `find_python REQUIREMENTS...` sets PYTHON to an interpreter that has them.
#
# A PYTHON given by the user (an Ascend image with its own torch and torch_npu) is taken as it is,
# nothing is installed. Else .venv at the top of the repository is made once, with uv inside it. On an
# Ascend host the user makes it, as README.md says: the torch of requirements.txt is a CUDA build.

find_python() {
    local root want stamp
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
    if [ -n "${PYTHON:-}" ]; then
        if ! command -v "$PYTHON" >/dev/null; then
            echo "error: PYTHON=$PYTHON does not exist; unset PYTHON, and a .venv is made" >&2
            return 1
        fi
        return 0
    fi
    PYTHON=$root/.venv/bin/python
    if _has_npu; then
        _has_torch_npu "$root/.venv" && return 0
        echo "error: this host has an Ascend NPU, and $root/.venv has no torch_npu; make it with" \
            "the five commands in README.md, Install, or name an interpreter that has torch," \
            "torch_npu and the packages of requirements.txt: PYTHON=python3" >&2
        return 1
    fi
    want=$(cd "$root" && cat "$@" | cksum)
    stamp=$root/.venv/.installed-$(echo "$@" | tr -c 'a-z\n' '-')
    if [ -x "$PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
        return 0
    fi

    if [ ! -x "$PYTHON" ]; then
        local base
        base=$(_python310) || return 1
        echo "making $root/.venv with $("$base" --version)"
        "$base" -m venv "$root/.venv" || {
            rm -rf "$root/.venv"
            echo "error: $base -m venv fails; install the venv package of your Python (Debian: apt-get install python3-venv)" >&2
            return 1
        }
    fi
    if ! "$PYTHON" -m uv --version >/dev/null 2>&1; then
        "$PYTHON" -m pip install --quiet uv || {
            echo "error: pip cannot install uv; check the network or the package index of pip" >&2
            return 1
        }
    fi
    local files=()
    for file in "$@"; do files+=(-r "$root/$file"); done
    echo "installing $* into $root/.venv"
    "$PYTHON" -m uv pip install --quiet --python "$PYTHON" --compile-bytecode "${files[@]}" || {
        echo "error: installing $* failed; run again, what is there is kept" >&2
        return 1
    }
    echo "$want" > "$stamp"
}

# The driver's device files; a container may have those of some cards only.
_has_npu() { compgen -G '/dev/davinci[0-9]*' >/dev/null; }

_has_torch_npu() { compgen -G "$1/lib/python3*/site-packages/torch_npu" >/dev/null; }

_python310() {
    local name
    for name in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$name"
            return 0
        fi
    done
    echo "error: no Python 3.10 or newer found; install one, or set PYTHON" >&2
    return 1
}
