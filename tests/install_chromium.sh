#!/usr/bin/env bash
# Installs the Chromium that the dashboard's tests look through, unless there is one.
set -euo pipefail
source "$(dirname "$0")/apt_install.sh"

command -v chromium >/dev/null && exit 0
apt_install chromium "Tests in a browser" "Install one by hand: chromium must be a command."
