"""Both stages of LLaVA at toy size, on drawn scenes."""
