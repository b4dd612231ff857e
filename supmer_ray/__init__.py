"""supmer-ray: self-supervised meta-prompt learning (SUPMER, arXiv:2303.12314) on Ray.

Nothing heavy is imported here: `supmer --help` must answer before torch or Ray could load.
"""

__version__ = "0.1.0"
