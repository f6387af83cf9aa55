# Sourced by every model's test/*.sh: `launch RANKS SCRIPT [FLAGS...] "$@"` runs SCRIPT of the model
# folder on RANKS devices, with its output in test/output/<id>/. It prints the one command in which
# it ends, so that a user can repeat it.

# Print the purpose of the launch script $1, which is its first comment, and the flags of all of them.
_usage() {
    local line
    while read -r line; do
        case $line in '# '*) echo "${line#\# }" && break ;; esac
    done <"$1"
    cat <<'TEXT'
Flags of all launch scripts, as --name=value; any other flag goes through to the program:
  --data_path=DIR        COCO folder: annotations/, train2017/, val2017/ (required; m2det: ~/data/coco)
  --device_id=N          card of a one-device run; name of the output folder
  --batch_size=N         images a device
  --nproc_per_node=N     devices of this node, instead of the script's number
  --nnodes=N --node_rank=K --master_addr=IP --master_port=PORT --local_addr=IP   several nodes
  --max_restarts=N       start all ranks anew, from the newest checkpoint, when one is lost
  --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT --rdzv_id=NAME --rdzv_conf=K=V,...   how nodes meet,
                         instead of by --node_rank and --master_addr
TEXT
}

launch() {
    local ranks=$1 script=$2 model folder data='' id='' nodes=1 node=0 port='' output=''
    local master=127.0.0.1 launcher=()
    shift 2
    model=$(cd "$(dirname "${BASH_SOURCE[1]}")/.." && pwd)
    folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    local flags=() word value paths=''
    for word in "$@"; do
        value=${word#*=}
        case $word in
            --data_path=* | --data-path=* | --data=* | --data_url=* | --data-url=*) data=$value ;;
            --device_id=* | --device-id=*) id=$value ;;
            --nproc_per_node=* | --nproc-per-node=*) ranks=$value ;;
            --nnodes=*) nodes=$value ;;
            --node_rank=* | --node-rank=*) node=$value ;;
            --master_addr=* | --master-addr=*) master=$value ;;
            --master_port=* | --master-port=*) port=$value ;;
            --local_addr=* | --local-addr=* | --max_restarts=* | --max-restarts=* | \
                --rdzv_*=* | --rdzv-*=*)
                launcher+=("$word")
                ;;
            --output_dir=* | --output-dir=*) output=$value ;;
            --train_annotations=* | --train-annotations=* | --train_images=* | --train-images=* | \
                --val_annotations=* | --val-annotations=* | --val_images=* | --val-images=*)
                paths=given
                flags+=("$word")
                ;;
            --help | -h)
                _usage "${BASH_SOURCE[1]}"
                echo "Those of $script:"
                flags+=(--help)
                data=.
                ;;
            --*) flags+=("$word") ;;
            *) _refuse "$word is no flag; write --name=value" ;;
        esac
    done
    if [ -z "$data" ] && [ -z "$paths" ]; then
        # In brackets the old scripts' words: whoever searches for them finds the answer.
        echo "error: give the folder of the data set with --data_path=DIR, or its files with" \
            "--train_annotations, --train_images, --val_annotations and --val_images" \
            '([Error] para "data_path" must be confing)' >&2
        exit 1
    elif [ -n "$data" ] && [ -n "$paths" ]; then
        echo "note: what --train_annotations, --train_images, --val_annotations and --val_images" \
            "name is taken instead of what is in --data_path=$data" >&2
    fi
    _require_whole_number --nproc_per_node "$ranks" 1
    _require_whole_number --nnodes "$nodes" 1
    _require_whole_number --node_rank "$node" 0
    if [ "$node" -ge "$nodes" ]; then
        _refuse "--node_rank=$node: of --nnodes=$nodes the last is $((nodes - 1))"
    fi
    # As in the old scripts: one device takes the card of the environment first, several devices take
    # their number.
    if [ "$((ranks * nodes))" = 1 ]; then
        id=${ASCEND_DEVICE_ID:-${id:-0}}
    else
        id=${id:-$((ranks * nodes))}
    fi

    export ONESTAGE_LAUNCH_TIME=${ONESTAGE_LAUNCH_TIME:-$(date +%s.%N)}
    if [ "${etp_running_flag:-}" != true ]; then
        source "$folder/env_npu.sh"
    fi
    choose_python "$model/.."
    local command=("$PYTHON")
    if [ "$((ranks * nodes))" != 1 ] || [ "${#launcher[@]}" != 0 ]; then
        # A free port, so that two runs on one host do not meet; several nodes must agree on one.
        if [ -z "$port" ] && [ "$nodes" != 1 ]; then
            port=23333
        elif [ -z "$port" ]; then
            port=$("$PYTHON" "$folder/addresses.py")
        fi
        command+=("$folder/launch.py" "--nproc_per_node=$ranks" "--nnodes=$nodes"
            "--node_rank=$node" "--master_addr=$master" "--master_port=$port" "${launcher[@]}")
    fi
    command+=("$model/$script")
    if [ -n "$data" ]; then
        command+=("--data=$data")
    fi
    command+=("--device_id=$id" "--output_dir=${output:-$model/test/output/$id}" "${flags[@]}")
    echo "${command[*]}"
    exec "${command[@]}"
}

# Set PYTHON, unless the user has: .venv of the repository $1 where it is there, else python3. Exit
# where it lacks a package, with its line.
choose_python() {
    local venv=$1/.venv/bin/python
    if [ -z "${PYTHON:-}" ]; then
        PYTHON=python3
        if [ -x "$venv" ]; then
            PYTHON=$venv
        fi
    fi
    if ! command -v "$PYTHON" >/dev/null; then
        _refuse "PYTHON=$PYTHON does not exist; unset PYTHON to take .venv, which bash quickstart.sh makes"
    fi
    "$PYTHON" "$(dirname "${BASH_SOURCE[0]}")/interpreter.py" || exit 1
}

_require_whole_number() {
    local name=$1 value=$2 least=$3
    case $value in
        '' | *[!0-9]*) _refuse "$name=$value: give a whole number" ;;
    esac
    if [ "$value" -lt "$least" ]; then
        _refuse "$name=$value: give at least $least"
    fi
}

_refuse() {
    echo "error: $*" >&2
    exit 2
}
