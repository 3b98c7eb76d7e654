#!/usr/bin/env bash
# Installs the Chromium that the dashboard's tests look through, unless there is one. Where it
# cannot, it says why, and those tests are skipped; in CI that is a failure.
set -euo pipefail

without() {
    echo "Tests in a browser will be skipped: there is no Chromium, and $1." >&2
    echo "Install one by hand: chromium must be a command." >&2
    [ "${CI:-}" != true ]
    exit
}

command -v chromium >/dev/null && exit 0
command -v apt-get >/dev/null || without "there is no apt-get to install it"
[ "$(id -u)" -eq 0 ] || without "only root may install it"
echo "Installing Chromium for the tests." >&2
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update -q && apt-get install -y -q --no-install-recommends chromium; }; then
    without "apt-get could not install it"
fi
