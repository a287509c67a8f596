"""The codecs' arithmetic, fast: encoders and accumulators."""
