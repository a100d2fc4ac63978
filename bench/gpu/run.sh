#!/usr/bin/env bash
# python -m bench gpu where squid_fast is not installed:
#
#   bash bench/gpu/run.sh [STAGE ...] [OPTION ...]
#
# Takes everything from the folder that this one lies in, see README.md. PYTHON names the Python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
for wheel in whl/*.whl; do
  [[ ! -e $wheel ]] || "$python" -m zipfile -e "$wheel" "$site"
done
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"
if ! "$python" -c 'import squid_fast.kernels, squid_fast.reference' 2>/dev/null; then
  # As an installation lays them: python -m and pytest look into this folder first.
  ln -sfn ../kernels squid_fast/kernels
  ln -sfn ../reference squid_fast/reference
fi
"$python" -m bench gpu "$@"
