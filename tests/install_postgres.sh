#!/usr/bin/env bash
# Installs the PostgreSQL server that the tests start for themselves, unless there is one.
set -euo pipefail
source "$(dirname "$0")/apt_install.sh"

[ -z "${TEST_POSTGRES_URL:-}" ] || exit 0
if command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then
    exit 0
fi
apt_install postgresql "Tests on PostgreSQL" \
    "Install one by hand (it needs initdb and pg_ctl), or set TEST_POSTGRES_URL."
