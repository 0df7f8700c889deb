"""What only a device can show, as programs: `bash tools/gpu_check.sh` runs them all, `python -m tests.gpu.PART` one of them."""
