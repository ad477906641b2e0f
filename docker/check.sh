#!/usr/bin/env bash
# `make docker-check`: build the cpu image and run the smoke profile in it, as an unprivileged user with a read-only
# root file system. Needs root (or Docker at hand), Debian's packages where Docker is missing, and .venv.
#
#   BASE=python:3.11-slim-bookworm docker/check.sh     # that base instead of one built here
#   KEEP=1 docker/check.sh                             # leave image, daemon and work folder behind
#
# Exit status: 0 passed, 1 the image is not right, 77 Docker or a base image cannot be had on this machine.
set -euo pipefail
cd "$(dirname "$0")/.."
ROOT=$PWD
WORK=${WORK:-$(mktemp -d /tmp/tunegate-docker-check.XXXXXX)}
IMAGE=tunegate-check:cpu
USER_ID=10001
STARTED=

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }
unable() { printf 'NOT CHECKED: %s\n' "$*" >&2; exit 77; }

finish() {
    status=$?
    if [ -n "$STARTED" ] && [ -z "${KEEP:-}" ]; then
        kill "$STARTED" 2>/dev/null && wait "$STARTED" 2>/dev/null || true
    fi
    if [ -z "${KEEP:-}" ]; then rm -rf "$WORK"; fi
    exit $status
}
trap finish EXIT

# Docker ------------------------------------------------------------------------------------------------------------
need_packages() {
    [ "$(id -u)" = 0 ] || unable "$* missing: install them, or run as root"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends "$@" \
        >/dev/null || unable "$* cannot be installed"
}

start_docker() {
    if docker info >/dev/null 2>&1; then return; fi
    command -v dockerd >/dev/null || need_packages docker.io iptables
    # Its own folders and socket: nothing of a Docker that may be set up here is touched.
    export DOCKER_HOST=unix://$WORK/docker.sock
    dockerd --host "$DOCKER_HOST" --data-root "$WORK/docker" --exec-root "$WORK/exec" --pidfile "$WORK/dockerd.pid" \
        >"$WORK/dockerd.log" 2>&1 &
    STARTED=$!
    for _ in $(seq 60); do
        if docker info >/dev/null 2>&1; then return; fi
        kill -0 "$STARTED" 2>/dev/null || { tail -5 "$WORK/dockerd.log" >&2; unable "dockerd ended"; }
        sleep 1
    done
    tail -5 "$WORK/dockerd.log" >&2
    unable "dockerd does not answer"
}

# The Dockerfile needs BuildKit: as a plugin of new clients, built into Debian's.
client() {
    if docker buildx version >/dev/null 2>&1; then echo docker
    elif [ -x /usr/bin/docker ]; then echo /usr/bin/docker
    else unable "this docker has no BuildKit: install docker-buildx-plugin or Debian's docker.io"; fi
}

# Base --------------------------------------------------------------------------------------------------------------
build_base() {
    command -v debootstrap >/dev/null || need_packages debootstrap
    [ "$(id -u)" = 0 ] || unable "debootstrap needs root; give BASE=python:3.11-slim-bookworm instead"
    # shellcheck source=/dev/null
    suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
    mirror=$(apt-get indextargets --format '$(REPO_URI)' "Codename: $suite" "Component: main" | head -1)
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$suite" "$WORK/base" "$mirror" \
        >"$WORK/debootstrap.log" || { tail -5 "$WORK/debootstrap.log" >&2; unable "debootstrap"; }
    rm -rf "$WORK"/base/var/cache/apt/archives/*.deb "$WORK"/base/var/lib/apt/lists/* "$WORK"/base/usr/share/doc \
        "$WORK"/base/usr/share/man "$WORK"/base/usr/share/locale
    tar -C "$WORK/base" -c . | docker import - tunegate-check:base >/dev/null
    rm -rf "$WORK/base"
}

say "Docker"
start_docker
CLIENT=$(client)
docker version --format 'server {{.Server.Version}}, client {{.Client.Version}}'

if [ -z "${BASE:-}" ]; then
    say "Base image"
    docker image inspect tunegate-check:base >/dev/null 2>&1 || build_base
    BASE=tunegate-check:base
fi

say "Wheels"
# Downloaded with this machine's own pip settings, so that the build itself needs no network and no credentials.
.venv/bin/python docker/lock.py --check
if ! cmp -s docker/constraints.txt docker/wheels/.constraints; then
    # `wheel`, not `download`: what comes as source only (kfp-server-api) is built here, where setuptools is at hand.
    .venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir docker/wheels --requirement docker/constraints.txt
    .venv/bin/python -m pip wheel --quiet --wheel-dir docker/wheels cyclonedx-bom==7.5.0 'setuptools>=77'
    cp docker/constraints.txt docker/wheels/.constraints
fi
du -sh docker/wheels | cut -f1

say "Build"
build() {
    DOCKER_BUILDKIT=1 nice "$CLIENT" build --quiet --network none --file docker/Dockerfile --target "$1" \
        --build-arg BASE="$BASE" --build-arg CUDA_BASE="$BASE" --build-arg PIP_NO_INDEX=1 \
        --build-arg TORCH_INDEX_URL= --build-arg VERSION="$(.venv/bin/python -c 'import tunegate; print(tunegate.__version__)')" \
        --build-arg REVISION="$(git rev-parse HEAD 2>/dev/null || echo unknown)" --tag "$2" .
}
build cpu "$IMAGE"

say "What is in it"
inside() { docker run --rm --read-only --tmpfs /tmp --network none "$IMAGE" "$@"; }
inside tunegate --version
[ "$(inside id -u)" = "$USER_ID" ] || fail "the image does not run as $USER_ID"
[ "$(docker image inspect --format '{{.Config.User}}' "$IMAGE")" = "$USER_ID:$USER_ID" ] || fail "no numeric user"
[ "$(docker image inspect --format '{{len .Config.Entrypoint}}' "$IMAGE")" = 0 ] || fail "there is an entry point"
if inside sh -c 'touch /opt/tunegate/x /usr/x /etc/x' 2>/dev/null; then fail "the root file system can be written"; fi
inside sh -c 'touch /tmp/x && python3 -c "import tempfile; tempfile.NamedTemporaryFile()"' || fail "/tmp cannot be written"
for tool in gcc cc g++ make ld git pip pip3; do
    if inside sh -c "command -v $tool" >/dev/null; then fail "$tool was left in the image"; fi
done
if inside python3 -m pip --version >/dev/null 2>&1; then fail "pip was left in the image"; fi
inside python3 -m kfp.dsl.executor_main --help >/dev/null || fail "Kubeflow's executor does not start"
inside python3 -c '
import json
bom = json.load(open("/usr/share/sbom/tunegate.cdx.json"))
names = {c["name"].lower() for c in bom["components"]}
assert bom["bomFormat"] == "CycloneDX" and {"torch", "kfp", "mlflow"} <= names, sorted(names)
print("SBOM: CycloneDX", bom["specVersion"], "with", len(names), "components")'
for label in title version revision created licenses source base.name; do
    value=$(docker image inspect --format "{{index .Config.Labels \"org.opencontainers.image.$label\"}}" "$IMAGE")
    [ -n "$value" ] || fail "the label $label is empty"
done

say "Size"
docker image inspect --format '{{.Size}} bytes' "$IMAGE"
docker history --no-trunc --format '{{.Size}}\t{{.CreatedBy}}' "$IMAGE" | cut -c1-100 | grep -v '^0B' || true
inside sh -c 'du -sk /opt/tunegate/lib/python3*/site-packages/* 2>/dev/null | sort -rn | head -15' \
    | awk '{n = $2; sub(".*/", "", n); printf "%8.1f MB  %s\n", $1 * 1024 / 1e6, n}'

say "Smoke profile by the DockerRunner, as user $USER_ID, root file system read-only"
mkdir -p "$WORK/runs" "$WORK/home"
chown "$USER_ID:$USER_ID" "$WORK/runs" "$WORK/home" 2>/dev/null || true
chmod 755 "$WORK"
socket=${DOCKER_HOST:-unix:///var/run/docker.sock}
as_user=()
if [ "$(id -u)" = 0 ]; then
    # The capability lets this side read an interpreter that lies in root's home; containers get none of it.
    as_user=(setpriv --reuid="$USER_ID" --regid="$USER_ID" --groups="$(stat -c %g "${socket#unix://}")"
        --inh-caps=+dac_read_search --ambient-caps=+dac_read_search)
fi
(
    cd "$WORK/runs"
    time "${as_user[@]}" env HOME="$WORK/home" DOCKER_HOST="$socket" "$ROOT/.venv/bin/tunegate" run --profile smoke \
        --runner docker --image "$IMAGE" --run-id docker-check --set storage.root="$WORK/runs" --json \
        >"$WORK/outcome.json"
) || true # a verdict other than PROMOTE has an exit code of its own; what counts is that every stage was done
if ! "$ROOT/.venv/bin/python" - "$WORK/outcome.json" <<'PYTHON'
import json
import sys

outcome = json.load(open(sys.argv[1]))
stages = {s["stage"]: s["status"] for s in outcome["stages"]}
assert outcome["status"] == "done", outcome
assert all(status == "done" for status in stages.values()), stages
print(f"{len(stages)} stages done, verdict {outcome['verdict']}, exit code {outcome['exit_code']}")
PYTHON
then
    tail -40 "$WORK"/runs/runs/docker-check/pipeline.log >&2
    fail "the smoke run"
fi
say "docker-check passed"
