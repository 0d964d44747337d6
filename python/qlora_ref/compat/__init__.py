"""Other libraries' names over our operations, so that code written for them runs by changing one import."""
