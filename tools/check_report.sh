#!/usr/bin/env bash
# Open a report in a headless Chromium as phone, desktop and print, light and dark: console, network, overflow, overlaps, contrast, sorting by keyboard. By hand.
# usage: tools/check_report.sh DIR/report.html [SHOTS]     Screenshots and a PDF come into SHOTS (default: check_report/): whole pages, and small_*.png.
# Needs node, npm, and Debian's chromium, which it installs as root where it is not there. PRISM_CHROMIUM: another browser.
set -euo pipefail
page=$(realpath "$1")
shots=$(realpath -m "${2:-check_report}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
chromium=${PRISM_CHROMIUM:-/usr/bin/chromium}
if [ ! -x "$chromium" ]; then
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core
fi
modules=$(realpath -m "${PRISM_PLAYWRIGHT:-.venv-playwright}")
if [ ! -d "$modules/node_modules/playwright-core" ]; then
    npm install --silent --no-audit --no-fund --prefix "$modules" playwright-core@1.65.1
fi
exec node tools/check_report.mjs "$modules/node_modules/playwright-core" "$chromium" "$page" "$shots"
