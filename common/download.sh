# Sourced by download_dataset.sh and download_weights.sh, which set `root`: a file from the network,
# resumed after an interruption, checked, and moved into place whole. It needs curl, wget or Python.
#
# A sum is written md5:DIGITS or sha256:DIGITS, where DIGITS may be the first ones of the sum. An
# empty one is not checked.

python=${PYTHON:-python3}
[ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python

die() {
    echo "error: $*" >&2
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# Prints the digits of the sum $1 (md5 or sha256) of the file $2.
sum_of() { "${1}sum" <"$2" | cut -d ' ' -f 1; }

# Whether there is a file $2 with the sum $1.
has_sum() {
    [ -f "$2" ] || return 1
    [ -n "$1" ] || return 0
    case $(sum_of "${1%%:*}" "$2") in
        "${1#*:}"*) return 0 ;;
        *) return 1 ;;
    esac
}

size_of() { if [ -f "$1" ]; then wc -c <"$1"; else echo 0; fi; }

# Leaves the file of the address $1 with the sum $3 at $2. After a wrong sum $4 is a further remedy.
download() {
    local url=$1 file=$2 sum=$3 remedy=$4 partial=$2.part kind=${3%%:*}
    echo "${file##*/}: downloading $url"
    if ! fetch "$url" "$partial"; then
        # A server asked for what follows the last byte may well answer with an error.
        if [ -z "$sum" ] || ! has_sum "$sum" "$partial"; then
            die "download of $url stopped; give the same command again to go on," \
                "or delete $partial to begin anew"
        fi
    elif ! has_sum "$sum" "$partial"; then
        mv -f "$partial" "$file.bad"
        die "wrong $kind sum of $url, kept as $file.bad ($(sum_of "$kind" "$file.bad") instead of" \
            "${sum#*:}); give the same command again to download it anew, $remedy"
    fi
    mv -f "$partial" "$file"
    rm -f "$file.bad"
}

# Downloads $1 to the file $2; tries again as long as a try brings more bytes.
fetch() {
    local before
    while before=$(size_of "$2") && ! fetch_rest "$1" "$2"; do
        [ "$(size_of "$2")" -gt "$before" ] || return 1
    done
}

# One try, beginning after the bytes that are already there.
fetch_rest() {
    if have curl; then
        local meter=--progress-bar
        [ -t 2 ] || meter=--silent
        curl --fail --location --show-error "$meter" --retry 5 --connect-timeout 30 \
            --speed-limit 1 --speed-time 60 --continue-at - --output "$2" "$1"
    elif have wget; then
        wget --no-verbose --tries=5 --timeout=60 --continue --output-document="$2" "$1"
    else
        "$python" - "$1" "$2" <<'PYTHON'
import os, shutil, sys, urllib.request

url, path = sys.argv[1:]
start = os.path.getsize(path) if os.path.exists(path) else 0
request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
try:
    with urllib.request.urlopen(request, timeout=60) as response:
        resumed = response.status == 206
        total = int(response.headers["Content-Length"]) + (start if resumed else 0)
        with open(path, "ab" if resumed else "wb") as file:
            shutil.copyfileobj(response, file, 1 << 20)
except OSError as error:
    sys.exit(f"{url}: {error}")
if os.path.getsize(path) != total:
    sys.exit(f"{url}: the connection broke")
PYTHON
    fi
}
