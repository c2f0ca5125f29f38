#!/bin/sh
# Sets up a virtual environment with Align-Pro and its tools. `make setup` calls it:
#
#     requirements/install.sh VENV DEVICE        DEVICE is cpu, cuda, rocm or oldest
#
# "oldest" is a CPU with the oldest supported versions of torch, Triton and transformers, for the tests.
#
# PYTHON names the interpreter, TORCH_INDEX another package index for torch. To run it again is safe at any time: what is
# installed stays. Only where a run was killed in the middle of an installation, or was for another device, the
# environment is made anew; pip keeps what it had downloaded. It builds the kernels in csrc/, which need a C++ compiler;
# without them everything runs, but slower. On a CPU they are compiled as soon as torch is there, while pip, which keeps one
# core busy at most, installs the rest.
set -eu

venv=$1
device=$2
python=${PYTHON:-python3}
requirements=$(dirname "$0")
unset PYTHONDONTWRITEBYTECODE # the new environment keeps its own bytecode: imports would take half a minute without
torch_cpu_index=https://download.pytorch.org/whl/cpu
torch_rocm_index=https://download.pytorch.org/whl/rocm7.2

fail() {
    printf 'set-up: %s\n' "$*" >&2
    exit 1
}

pip_install() {
    # compile_modules does that for all packages at once.
    "$venv/bin/python" -m pip --disable-pip-version-check --no-input install --no-compile "$@"
}

pins_of_oldest() {
    # The pins of oldest.txt, and those of cpu.txt for all other packages.
    awk -F '==' 'NR == FNR { if (NF > 1) old[$1] } NR == FNR || !($1 in old)' \
        "$requirements/oldest.txt" "$requirements/cpu.txt"
}

install_oldest_torch() {
    # Of this version PyPI has the CUDA build alone, which does not load without its libraries.
    pip_install --no-deps --index-url "${TORCH_INDEX:-$torch_cpu_index}" -r "$venv/torch.txt" && return
    echo "set-up: there is no CPU build of this torch; taking the one of the configured package sources, with its CUDA"
    pip_install -r "$venv/torch.txt" -c "$venv/pins.txt"
}

install_oldest() {
    pins_of_oldest >"$venv/pins.txt"
    grep '^torch==' "$venv/pins.txt" >"$venv/torch.txt"
    install_oldest_torch && begin_kernels "$venv/pins.txt" && pip_install -r "$venv/pins.txt" -r "$requirements/dev.txt"
}

install_torch_for_cpu() {
    # The version stands in cpu.txt alone. Its dependencies come from there too, not from PyTorch's index.
    grep '^torch==' "$requirements/cpu.txt" >"$venv/torch.txt"
    if [ -z "${TORCH_INDEX:-}" ]; then
        pip_install --no-deps -r "$venv/torch.txt" 2>"$venv/torch.log" && return
        echo "set-up: the configured package sources have no CPU build of torch; trying $torch_cpu_index"
    fi
    pip_install --no-deps --index-url "${TORCH_INDEX:-$torch_cpu_index}" -r "$venv/torch.txt" && return
    [ ! -s "$venv/torch.log" ] || cat "$venv/torch.log" >&2
    return 1
}

install_torch_for_gpu() {
    # PyPI's own build is the one for CUDA: gpu.txt brings it. Anything else comes from an index that PyTorch keeps.
    [ "$device" = rocm ] || [ -n "${TORCH_INDEX:-}" ] || return 0
    pip_install --index-url "${TORCH_INDEX:-$torch_rocm_index}" "$(grep '^torch>=' "$requirements/gpu.txt")"
}

build_kernels() {
    # The sources of this tree, which is not installed yet while pip is at work. The libraries go to the user's cache, which
    # outlives the environment.
    exec env PYTHONPATH="$requirements/../kernels" "$venv/bin/python" -m alignpro_kernels.build
}

begin_kernels() {
    # With the packages that torch and its headers' finder need, by the pins in the file $1. The output waits for pip's.
    pip_install -r "$venv/torch.txt" setuptools -c "$1" || return
    echo "set-up: building the kernels in csrc/, once, while the other packages are installed"
    build_kernels >"$venv/kernels.log" 2>&1 &
    kernels=$!
}

end_kernels() {
    if [ -z "$kernels" ]; then
        echo "set-up: building the kernels in csrc/, once"
        (build_kernels)
    elif wait "$kernels"; then
        cat "$venv/kernels.log"
    else
        cat "$venv/kernels.log" >&2
        return 1
    fi
}

compile_modules() {
    # To bytecode, on all cores, as pip would on one. The packages' own tests and most of the hundreds of architectures are
    # never imported; Python compiles a module that is. A file that no version of Python 3 compiles is no error here.
    "$venv/bin/python" -m compileall -qq -j 0 -x '/(tests?|transformers/models)/' "$venv"/lib/python3*/site-packages || true
}

stop_kernels() {
    # A background process of a shell ignores an interrupt from the terminal. It removes what it has built by itself.
    [ -z "$kernels" ] || kill "$kernels" 2>/dev/null || true
}

install_all() {
    case $device in
        cpu)
            install_torch_for_cpu && begin_kernels "$requirements/cpu.txt" &&
                pip_install -r "$requirements/cpu.txt" -r "$requirements/dev.txt"
            ;;
        oldest) install_oldest ;;
        *) install_torch_for_gpu && pip_install -r "$requirements/gpu.txt" -r "$requirements/dev.txt" ;;
    esac && pip_install --no-deps --no-build-isolation -e "$requirements/.."
}

case $device in
    cpu | oldest) on_cpu=yes ;;
    cuda | rocm) on_cpu=no ;;
    *) fail "unknown device '$device': take DEVICE=cpu, cuda, rocm or oldest" ;;
esac
command -v "$python" >/dev/null ||
    fail "no Python by the name '$python'; give one of 3.11 or newer: make PYTHON=/path/to/python3.12"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "Python 3.11 or newer is needed, and '$python' is $("$python" -V 2>&1); give another: make PYTHON=python3.12"

if [ -e "$venv/.installing" ]; then
    echo "set-up: the last one was interrupted; making $venv anew"
elif [ -e "$venv/.device" ] && [ "$(cat "$venv/.device")" != "$device" ]; then
    echo "set-up: $venv is for $(cat "$venv/.device"), and this is for $device; making it anew"
elif "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    keep=yes
fi
if [ -z "${keep:-}" ]; then
    "$python" -m venv --clear "$venv" ||
        fail "'$python -m venv' failed; on Debian and Ubuntu it is a package of its own: apt install python3-venv"
fi

# A signal leaves the marker behind, since pip may have been stopped between the files of a package. A pip that gives up
# by itself has undone what it began.
kernels=
trap 'stop_kernels; exit 130' INT
trap 'stop_kernels; exit 143' TERM HUP
: >"$venv/.installing"
install_all || {
    rm -f "$venv/.installing"
    stop_kernels
    fail "pip could not install the packages; see its message above. The same command goes on from here"
}
printf '%s\n' "$device" >"$venv/.device"
rm -f "$venv/.installing"

# The configured sources may hold a CPU build that satisfies gpu.txt as well.
[ "$on_cpu" = yes ] || "$venv/bin/python" -c 'import sys, torch; sys.exit(not (torch.version.cuda or torch.version.hip))' ||
    fail "torch came as a CPU build; name an index with one for $device (make TORCH_INDEX=https://…), or take DEVICE=cpu"

compile_modules &
modules=$!

# DeepSpeed compiles this when several ranks first start on a CPU; better a minute here than in a job.
[ "$on_cpu" = no ] || DS_ACCELERATOR=cpu "$venv/bin/python" -m alignpro.distributed.deepspeed.compilation || {
    echo "set-up: DeepSpeed's part for several processes on a CPU could not be built, see the message above."
    echo "set-up: one process trains without it. To try again: $venv/bin/python -m alignpro.distributed.deepspeed.compilation"
} >&2

# On a GPU machine too: some work stays on the CPU.
end_kernels || {
    echo "set-up: the kernels in csrc/ could not all be built, see the message above; everything else is installed."
    echo "set-up: in their place runs plain PyTorch, slower. To try again: $venv/bin/python -m alignpro_kernels.build"
} >&2
wait "$modules"
