"""All rules. Importing this package registers them, in the order in which a report lists them."""

from export.preflight.rules import stored, versions, datatypes, quantization, shapes, restrictions, kernels  # isort: skip

__all__ = ["datatypes", "kernels", "quantization", "restrictions", "shapes", "stored", "versions"]
