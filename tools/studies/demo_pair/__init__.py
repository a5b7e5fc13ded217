"""The facts and the texts that the pair that ships was trained on."""
