"""Any other vision-language model that Transformers loads, on the same questions."""
