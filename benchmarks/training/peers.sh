#!/usr/bin/env bash
# The peers' virtual environments: benchmarks/training/.peers/trl-1.12 (PPO) and trl-1.16 (SFT, reward model).
# They see torch, transformers and accelerate of the project's environment, so both sides compute on the same versions.
set -euo pipefail
cd "$(dirname "$0")"
venv=${1:-../../.venv}
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
for version in 1.12.0 1.16.0; do
    peer=.peers/trl-${version%.*}
    [ -f "$peer/.installed" ] && continue
    "$venv/bin/python" -m venv --clear "$peer"
    echo "$site" > "$("$peer/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
    "$peer/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "trl==$version"
    "$peer/bin/python" -m pip install --quiet --disable-pip-version-check 'datasets>=4' pandas
    touch "$peer/.installed"
done
