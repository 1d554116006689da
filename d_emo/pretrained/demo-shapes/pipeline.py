"""The pipeline, for diffusers' custom_pipeline."""

from d_emo import DEMOPipeline

__all__ = ["DEMOPipeline"]
