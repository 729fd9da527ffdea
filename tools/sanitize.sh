#!/usr/bin/env bash
# Build the engine's C with AddressSanitizer and UndefinedBehaviorSanitizer, beside the ordinary build, and run the tests that
# reach it. libunicorn.a is not instrumented, and the code it generates is not. Any finding ends with an error.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
root=$PWD/build/sanitize
log=$root/setup.log
tests=(${TESTS:-tests/test_soft_files.py tests/test_descriptors.py tests/test_copy_out.py tests/test_layout.py
    tests/test_ioctl_arguments.py tests/test_soft_ioctls.py tests/test_soft_state.py tests/test_soft_memslots.py
    tests/test_run_contract.py tests/test_dirty_log.py tests/test_dirty_ring.py tests/test_guest_memfd.py
    tests/test_private_memory.py tests/test_gmem_file.py tests/test_host_memory.py tests/test_devices.py
    tests/test_exceptions.py tests/test_smp.py tests/test_api.py})

asan=$(gcc -print-file-name=libasan.so)
[ -e "$asan" ] || { echo "sanitize: gcc has no libasan (Debian: libgcc-*-dev)"; exit 1; }
mkdir -p "$root"
echo "sanitize: building in build/sanitize"
# no alignment, no null: guest memory is accessed as x86 allows, and may be at address 0
flags="-fsanitize=address,undefined -fno-sanitize=alignment,null -fno-sanitize-recover=undefined"
ANYKVM_ENGINE_CFLAGS="$flags" "$bin/python" -m pip install -q --disable-pip-version-check --no-deps --upgrade \
    --target "$root/lib" . >"$log" 2>&1 || { tail -20 "$log"; echo "sanitize: the build failed (all of its output: $log)"; exit 1; }

# The engine handles SIGSEGV and SIGBUS, guests live on it; Python does not free everything. The mappings of the engine's
# own address space leave no room for the sanitizer's quarantine of freed memory to grow without limit.
export ASAN_OPTIONS=handle_segv=0:handle_sigbus=0:allow_user_segv_handler=1:use_sigaltstack=0:detect_leaks=0:detect_stack_use_after_return=0:exitcode=99
export UBSAN_OPTIONS=print_stacktrace=1
export PYTHONMALLOC=malloc
instrumented() {
    PYTHONPATH="$root/lib:tests" LD_PRELOAD="$asan $(gcc -print-file-name=libubsan.so)" "$bin/python" "$@"
}

# First what must be found: a structure that is shorter than C reads.
found=0
instrumented - >"$log" 2>&1 <<'PYTHON' || found=$?
import ctypes
from anykvm.backends.soft.engine.library import AkSlot, library
engine = library()
libc = ctypes.CDLL(None)
libc.calloc.restype = ctypes.c_void_p
short = libc.calloc(1, ctypes.sizeof(AkSlot) - 16)
engine.ak_set_memslot(engine.ak_vm_create(), None, ctypes.cast(short, ctypes.POINTER(AkSlot)))
PYTHON
[ "$found" = 99 ] && grep -q "AddressSanitizer.*ak_slot_prepare" "$log" || { tail -20 "$log"; echo "sanitize: it does not find what it must ($found)"; exit 1; }

instrumented - "${tests[@]}" <<'PYTHON'
import sys
import anykvm, pytest
if "build/sanitize" not in anykvm.__file__:
    sys.exit(f"sanitize: {anykvm.__file__} is not the instrumented build")
sys.exit(pytest.main(["-q", "--capture=sys", "-p", "no:cacheprovider", *sys.argv[1:]]))
PYTHON
echo "make sanitize: no finding"
