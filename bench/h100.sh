#!/usr/bin/env bash
# On a machine with a GPU: is what the suites time right at real sizes, then the suites, all within
# one limit.
#
#   bench/h100.sh SUITE...              e.g. bench/h100.sh attention "attention --cases flux-768-*"
#
# A suite is a name of `python -m bench` that takes --out FOLDER and --limit-s, with options of its
# own if it is quoted. Each gets an equal share of the time that is left when it starts; what was
# measured by then stays. Exits with the first status that was not 0.
#
#   OUT      folder of the records and logs      (bench/results; logs go to out/h100 then)
#   LIMIT_S  seconds for everything              (540)
#   TESTS_S  seconds of these for the tests at most; 0: they have run before (3/5 of LIMIT_S)
#   PYTHON   the interpreter                     (python3)
#   WORKERS  processes that compile kernels for the tests of all sizes; needs pytest-xdist (none)
#   COMMIT   of the code, where git cannot tell  (none)
set -u
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
out=${OUT:-bench/results}
logs=${OUT:-out/h100}
limit=${LIMIT_S:-540}
tests=${TESTS_S:-$((limit * 3 / 5))}
status=0

if [ $# -eq 0 ]; then
  echo "usage: [OUT=FOLDER] [LIMIT_S=540] bench/h100.sh SUITE..." >&2
  exit 2
fi
mkdir -p "$out" "$logs" || exit 1

# run NAME SECONDS COMMAND...: log it, interrupt it when its seconds are over, remember a failure
run() {
  local name=$1 seconds=$2 code
  shift 2
  echo "== $name, $seconds s: $*"
  timeout --signal=INT --kill-after=15 "$seconds" "$@" 2>&1 | tee -a "$logs/$name.log"
  code=${PIPESTATUS[0]}
  if [ "$code" -ne 0 ]; then
    echo "== $name ended with $code"
    [ "$status" -ne 0 ] || status=$code
  fi
}

# what a suite times is tested before it; the first files run anywhere, here with the table's tiles
joint="test_joint_kernels test_joint_properties"
joint_gpu="test_joint_gpu test_bench_measure"
rope3d="test_rope3d_kernels test_qformer_kernels"
rope3d_gpu="test_rope3d_gpu test_cuda_graphs_gpu"
flux="test_joint_kernels test_norm_rope_kernels test_modulation_kernels"
edit="test_bench_edit_speed"
edit_gpu="test_cuda_graphs_gpu test_editor_gpu test_bench_edit_speed_gpu"
flux_gpu="test_norm_rope_gpu test_modulation_gpu test_fp8_linear_gpu test_fast_flux_gpu"
anywhere= on_gpu=
for suite in "$@"; do
  case ${suite%% *} in
    attention) anywhere+=" $joint" on_gpu+=" $joint_gpu" ;;
    edit-speed) anywhere+=" $edit" on_gpu+=" $edit_gpu" ;;
    qformer | encode) anywhere+=" $rope3d" on_gpu+=" $rope3d_gpu" ;;
    flux | flux-train) anywhere+=" $flux" on_gpu+=" $flux_gpu" ;;
    training) anywhere+=" $flux $rope3d" on_gpu+=" $flux_gpu $rope3d_gpu test_train_gpu" ;;
    tune) anywhere+=" $joint $rope3d" on_gpu+=" $joint_gpu $rope3d_gpu" ;;
  esac
done
# files NAME...: each once, as paths
files() { printf '%s\n' "$@" | awk '!seen[$0]++ {print "tests/" $0 ".py"}'; }
if [ -n "$on_gpu" ] && [ "$tests" -gt 0 ]; then
  mapfile -t names < <(files $on_gpu)
  run gpu-tests $((tests * 2 / 3)) "$python" -m pytest "${names[@]}" -m gpu -q -p no:cacheprovider
  mapfile -t names < <(files $anywhere)
  run kernel-tests $((tests / 3)) "$python" -m pytest "${names[@]}" -q -p no:cacheprovider \
    ${WORKERS:+-n "$WORKERS"}
fi

suites_left=$#
for suite in "$@"; do
  read -ra words <<<"$suite"
  seconds=$(((limit - SECONDS) / suites_left))
  suites_left=$((suites_left - 1))
  if [ "$seconds" -lt 60 ]; then
    echo "== ${words[0]} was not run: $seconds s are left for it"
    [ "$status" -ne 0 ] || status=124
    continue
  fi
  # it stops by itself earlier than it would be stopped: imports are not counted by it
  options=(--out "$out" --limit-s $((seconds - 25)))
  [ -z "${COMMIT:-}" ] || options+=(--commit "$COMMIT")
  run "${words[0]}" "$seconds" "$python" -m bench "${words[@]}" "${options[@]}"
done

echo "== $SECONDS s; in $out:"
ls -l "$out"
exit "$status"
