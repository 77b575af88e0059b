"""What a recipe's stages will take: memory, time and money, from shapes alone."""
