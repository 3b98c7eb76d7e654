# Sourced by the scripts that install what some tests need:
#   apt_install PACKAGE "Tests on X" "How to get it otherwise."
# Where it cannot, it says why, and those tests are skipped; in CI that is a failure.

apt_install() {
    local package=$1 tests=$2 otherwise=$3 why=""
    if ! command -v apt-get >/dev/null; then
        why="there is no apt-get to install it"
    elif [ "$(id -u)" -ne 0 ]; then
        why="only root may install it"
    else
        echo "Installing $package for the tests." >&2
        export DEBIAN_FRONTEND=noninteractive
        if apt-get update -q && apt-get install -y -q --no-install-recommends "$package"; then
            return 0
        fi
        why="apt-get could not install it"
    fi
    echo "$tests will be skipped: $package is not installed, and $why." >&2
    echo "$otherwise" >&2
    [ "${CI:-}" != true ]
}
