# Sourced by ./run and ./check: a virtual environment with what they need, made on first use.
# FLAME_VENV names another place for it than .venv beside this project.

# The first Python that FLAME runs on.
find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "FLAME needs Python 3.11, 3.12 or 3.13 on the PATH; found none of them." >&2
    return 1
}

# ensure_environment EXTRAS: installs this project with the extras (separated by commas), once for
# each pyproject.toml.
ensure_environment() {
    local extras=$1 python stamp
    environment=${FLAME_VENV:-$PWD/.venv}
    stamp="$environment/.flame-$extras"
    if [ -x "$environment/bin/python" ] && cmp -s pyproject.toml "$stamp"; then
        return
    fi
    if [ ! -x "$environment/bin/python" ]; then
        python=$(find_python)
        echo "Creating the virtual environment $environment ..." >&2
        if ! "$python" -m venv "$environment"; then
            echo "Could not create it. On Debian or Ubuntu: apt-get install python3-venv" >&2
            return 1
        fi
    fi
    echo "Installing flame-engine[$extras] into it (first use only) ..." >&2
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check \
        --editable ".[$extras]" >&2
    cp pyproject.toml "$stamp"
}
