"""The maths: pure tensor functions on (..., H, W), which know neither modules nor files."""
