"""From text to tokens: training a tokenizer, chat templates, encoding with exact weights, and showing the result."""
