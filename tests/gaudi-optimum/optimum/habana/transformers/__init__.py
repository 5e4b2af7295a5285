"""optimum.habana.transformers"""
