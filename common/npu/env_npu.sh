# Sourced: the environment of a run on Ascend NPUs. Silent and harmless on a host without CANN;
# a variable that is set already is left as it is.

_set() { [ -n "${!1+set}" ] || export "$1=$2"; }

_set TORCH_DEVICE_BACKEND_AUTOLOAD 0 # torch_npu is imported by common.npu.device, with advice
if [ -z "${ASCEND_HOME_PATH:-}" ]; then
    _install=$(sed -n 's/^Install_Path=//p' /etc/Ascend/ascend_cann_install.info 2>/dev/null || true)
    for _base in ${_install:+"$_install"} /usr/local/Ascend "${HOME:-/root}/Ascend"; do
        for _part in ascend-toolkit cann nnae; do
            if [ -f "$_base/$_part/set_env.sh" ]; then
                _flags=$- # CANN's scripts are not made for `set -eu`
                set +eu
                source "$_base/$_part/set_env.sh"
                case $_flags in *e*) set -e ;; esac
                case $_flags in *u*) set -u ;; esac
                break 2
            fi
        done
    done
    unset _install _base _part _flags
fi
# The driver's libraries, which not every image has on the path.
for _part in lib64 lib64/common lib64/driver; do
    _base=/usr/local/Ascend/driver/$_part
    case :${LD_LIBRARY_PATH:-}: in
        *:"$_base":*) ;;
        *) [ ! -d "$_base" ] || export LD_LIBRARY_PATH="$_base${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" ;;
    esac
done
unset _base _part
# torch_npu gives each rank its share of the cores, and each thread that launches kernels a core of
# its own; where cores were chosen already (taskset, a container) these stay.
if [ "$(env -u OMP_NUM_THREADS nproc 2>/dev/null)" = "$(nproc --all 2>/dev/null)" ]; then
    _set CPU_AFFINITY_CONF 2
fi
_set TASK_QUEUE_ENABLE 2            # kernels are launched, workspaces handled by a second thread
_set HCCL_CONNECT_TIMEOUT 1800      # seconds for ranks that start unevenly
_set HCCL_WHITELIST_DISABLE 1
_set ASCEND_GLOBAL_LOG_LEVEL 3      # errors only
_set ASCEND_SLOG_PRINT_TO_STDOUT 0
_set ASCEND_GLOBAL_EVENT_ENABLE 0
unset -f _set
