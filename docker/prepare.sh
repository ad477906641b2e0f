#!/bin/sh
# Runs inside the build stages of docker/Dockerfile; POSIX sh, since the bases promise no more.
#
#   prepare.sh environment [INDEX]   /opt/tunegate with everything that constraints*.txt pin
#   prepare.sh project [EXTRAS]      the project itself, the SBOM, and what the final image needs besides, in /image
#
# Wheels that lie in /wheels are preferred; PIP_NO_INDEX=1 takes nothing else.
set -eu

TOOLS=/opt/tools          # builds the wheel and the SBOM; stays behind in the build stage
TARGET=/opt/tunegate
CYCLONEDX=cyclonedx-bom==7.5.0
if [ "${PIP_INDEX_URL:-}" = "" ]; then unset PIP_INDEX_URL; fi
if [ "${PIP_NO_INDEX:-}" = "" ]; then unset PIP_NO_INDEX; fi

into() { # into PYTHON ARGUMENTS…: pip install into an environment that has no pip of its own
    python=$1
    shift
    "$TOOLS/bin/python3" -m pip --python "$python" install --quiet --find-links /wheels "$@"
}

environment() {
    python3 -m venv "$TOOLS"
    "$TOOLS/bin/python3" -m pip install --quiet --find-links /wheels 'setuptools>=77' "$CYCLONEDX"
    python3 -m venv --without-pip "$TARGET"
    if [ -n "${1:-}" ]; then
        # The local version (+cpu) sorts above the plain one, so pip takes it where the index has it.
        into "$TARGET/bin/python3" --extra-index-url "$1" "$(grep '^torch==' /build/constraints.txt)" \
            --constraint /build/constraints.txt
    fi
    # shellcheck disable=SC2046 - the words are wanted
    into "$TARGET/bin/python3" $(printf -- '--requirement %s ' /build/constraints*.txt)
}

project() {
    cd /source
    "$TOOLS/bin/python3" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /build/dist .
    wheel=$(echo /build/dist/*.whl)
    into "$TARGET/bin/python3" --constraint /build/constraints.txt "$wheel${1:+[$1]}"
    slim
    mkdir -p /image/usr/share/sbom /image/etc
    "$TOOLS/bin/cyclonedx-py" environment "$TARGET/bin/python3" --pyproject /source/pyproject.toml \
        --mc-type application --output-reproducible --spec-version 1.6 --output-format JSON \
        --output-file /image/usr/share/sbom/tunegate.cdx.json
    # A name for the numeric user, since getpass and ssh ask for one; nobody can log in as it.
    { cat /etc/passwd; echo 'tunegate:x:10001:10001:Tunegate:/tmp:/usr/sbin/nologin'; } > /image/etc/passwd
    { cat /etc/group; echo 'tunegate:x:10001:'; } > /image/etc/group
    mkdir -p /image/workspace
    chmod 1777 /image/workspace
}

slim() { # what only serves to compile C++ extensions or to run the tests of dependencies
    site=$(echo "$TARGET"/lib/python3*/site-packages)
    rm -rf "$site"/torch/include "$site"/torch/share "$site"/torch/test "$site"/pyarrow/include "$site"/pyarrow/src \
        "$site"/pyarrow/tests
    find "$site" -type d -name tests \( -path '*/sklearn/*' -o -path '*/scipy/*' -o -path '*/pandas/*' \
        -o -path '*/matplotlib/*' \) -prune -exec rm -rf {} +
    find "$site" \( -name '*.a' -o -name '*.pyx' -o -name '*.pxd' \) -delete
}

"$@"
