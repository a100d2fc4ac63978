#!/usr/bin/env bash
# One command for a machine with a GPU: kernel tests on the device, microbenchmarks, ceilings,
# screening throughput and training steps, in less than nine minutes.
#
#   bench/gpu.sh [--cpu] [FOLDER]     FOLDER: $OUT, or bench/results/gpu
#
# Every step runs in a process of its own, within the time that is left. A step that fails or hangs
# is reported and the others go on. Exits with 0 if all steps passed, 1 if one failed, 2 if there is
# no GPU. --cpu rehearses all of it without one, at tiny sizes. Nothing is fetched.
#
# FOLDER afterwards: summary.json and summary.txt (exit code and seconds of each step), log.txt,
# roofline_*.json, micro_*.json, speed_*.json. In the environment, BENCH_COMMIT names the commit where
# git cannot, PYTHON the Python, BENCH_LIMIT the seconds, BENCH_ONLY the steps (an extended regular
# expression), BENCH_TESTS the file of kernel tests.
set -uo pipefail

device=cuda sizes=core
if [[ "${1:-}" == --cpu ]]; then
  device=cpu sizes=tiny
  shift
fi
started=$SECONDS
limit=${BENCH_LIMIT:-530}
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-$(command -v python || command -v python3)}

if [[ $device == cuda ]] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "PyTorch sees no GPU here (asked $python). To rehearse without one: bench/gpu.sh --cpu" >&2
  exit 2
fi

out=${1:-${OUT:-bench/results/gpu}}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
rm -f "$out"/{summary.json,summary.txt,log.txt,{roofline,micro,speed}_"$device".json}
log=$out/log.txt
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

left() { echo $((limit - (SECONDS - started))); }

# summary: names, exit codes and seconds of the steps so far, as JSON and as text.
names=() codes=() seconds=()
summary() {
  local i separator='' state
  {
    printf '{"device": "%s", "limit_s": %d, "seconds": %d, "steps": [\n' \
      "$device" "$limit" $((SECONDS - started))
    for i in "${!names[@]}"; do
      printf '%s {"step": "%s", "rc": %d, "seconds": %d}' \
        "$separator" "${names[i]}" "${codes[i]}" "${seconds[i]}"
      separator=$',\n'
    done
    printf '\n]}\n'
  } >"$out/summary.json"
  for i in "${!names[@]}"; do
    case ${codes[i]} in
      0) state=ok ;;
      124 | 137) state='FAILED (out of time)' ;;
      *) state="FAILED (${codes[i]})" ;;
    esac
    printf '%-40s %4d s  %s\n' "${names[i]}" "${seconds[i]}" "$state"
  done >"$out/summary.txt"
}

# step NAME SECONDS COMMAND...: run it within these seconds or what is left, and note how it ended.
step() {
  local name=$1 most=$2 begun=$SECONDS code
  shift 2
  [[ $name =~ ${BENCH_ONLY:-.} ]] || return
  ((most < $(left))) || most=$(left)
  printf '\n== %s (at most %d s)\n' "$name" "$most" | tee -a "$log"
  if ((most < 5)); then
    code=124
  else
    # An interrupted pytest still says what failed.
    timeout --signal=INT --kill-after=5 "$most" "$@" >"$scratch/step.txt" 2>&1
    code=$?
    cat "$scratch/step.txt" >>"$log"
    tail -n 4 "$scratch/step.txt"
  fi
  names+=("$name") codes+=("$code") seconds+=($((SECONDS - begun)))
  summary
}

has() { "$python" -c "import $1" >/dev/null 2>&1; }

environment() {
  if [[ $device == cuda ]]; then nvidia-smi || echo "nvidia-smi failed"; fi
  "$python" -m pip list 2>/dev/null | grep -iE '^(torch|triton|numpy|einops|pytest|hypothesis)' || true
  "$python" - "$device" <<'END'
import json, sys, torch
from bench.measurements import describe
print(json.dumps(describe(torch.device(sys.argv[1]))))
END
}
export -f environment
export python device

# micro OPERATION SECONDS FOLDER OPTION...: the command that runs its benchmarks, by pytest-benchmark
# or without it by the plain runner. Options of our own need their "=": see conftest.py.
if has pytest_benchmark; then
  micro() {
    micro_command=("$python" -m pytest --benchmark -k "test_speed and $1" "--bench-seconds=$2"
      "--bench-results=$3" "--bench-device=$device" "--bench-sizes=$sizes" -q -p no:cacheprovider
      -W default --tb=line --benchmark-columns=median,iqr,rounds "${@:4}")
  }
  check=--benchmark-disable
else
  micro() {
    micro_command=("$python" -m bench.operations.micro --operation "$1" --seconds "$2" --output "$3"
      --device "$device" --sizes "$sizes" "${@:4}")
  }
  check=--check
fi

if ! has squid_fast.reference; then
  step "install" 60 "$python" -m pip install -q --no-index --no-deps --no-build-isolation -e .
fi
step "environment" 60 bash -c environment
step "ceilings" 60 "$python" -m bench.operations.roofline --device "$device" --sizes "$sizes" --output "$out"

operations=(memory_lookup gumbel_shrinkage masked_shortcut neighbourhood_attention inpaint_block)

# Compiling takes longer than timing. So the contenders are compiled and verified side by side, while
# the tests run and nothing is timed; the processes that time them find their code in the caches.
helpers=()
if [[ $device == cuda && microbenchmarks =~ ${BENCH_ONLY:-.} ]]; then
  export TORCHINDUCTOR_CACHE_DIR="$scratch/inductor" TORCHINDUCTOR_COMPILE_THREADS=2
  for operation in "${operations[@]}"; do
    micro "$operation" 150 "$scratch/$operation" "$check"
    timeout --kill-after=5 170 "${micro_command[@]}" >"$scratch/compile_$operation.txt" 2>&1 &
    helpers+=($!)
  done
fi
# Every file of kernel tests in a process of its own: side by side on a GPU, where compiling takes
# most of the time; the rehearsal makes do with one file.
kernel_tests() {
  local file job logs code=0
  set -m  # or jobs would ignore an interrupt, after which pytest says what failed
  if [[ $device == cpu ]]; then set -- tests/kernels/test_gumbel_shrinkage.py; else set -- tests/kernels/test_*.py tests/test_inference.py tests/test_step_graphs.py; fi
  if [[ -n "${BENCH_TESTS:-}" ]]; then set -- "$BENCH_TESTS"; fi
  logs=$(mktemp -d)
  for file; do
    "$python" -m pytest "$file" -q --tb=short -p no:cacheprovider -p no:benchmark \
      >"$logs/$(basename "$file").txt" 2>&1 &
  done
  trap 'kill -INT $(jobs -p); sleep 3; kill -KILL $(jobs -p) 2>/dev/null; cat "$logs"/*; exit 124' INT
  for job in $(jobs -p); do wait "$job" || code=$?; done
  cat "$logs"/*
  rm -rf "$logs"
  return "$code"
}
export -f kernel_tests
step "kernel tests" 180 bash -c kernel_tests
if ((${#helpers[@]})); then
  wait "${helpers[@]}"
  tail -n 40 "$scratch"/compile_*.txt >>"$log"
fi

# End to end first: it is what counts, and short. What time is left is the operations'.
for part in evaluation screening training; do
  rounds=15 batch=()
  if [[ $device == cpu ]]; then rounds=1 batch=(--batch 2 --threads 1); fi
  step "end to end: $part" 60 "$python" -m bench.scoring.speed --device "$device" --rounds "$rounds" \
    --part "$part" --output "$out" ${batch[@]+"${batch[@]}"}
done

for index in "${!operations[@]}"; do
  operation=${operations[index]}
  share=$(($(left) / (${#operations[@]} - index)))
  micro "$operation" $((share > 25 ? share - 15 : share)) "$out"
  step "microbenchmarks: $operation" "$share" "${micro_command[@]}"
done

printf '\n'
cat "$out/summary.txt"
for code in "${codes[@]}"; do ((code == 0)) || exit 1; done
