"""What GPUs can compute."""

# Dense peak TFLOP/s from the makers' data sheets, (bf16, fp32 without TF32); the first name found in the device's counts.
GPU_PEAKS = {
    "B200": (2250, 75),
    "H200": (989, 67),
    "H100 PCIe": (756, 51),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "L40S": (362, 91.6),
    "L4": (121, 30.3),
    "A40": (150, 37.4),
    "A10": (125, 31.2),
    "RTX 4090": (165, 82.6),
    "RTX 3090": (71, 35.6),
}
