"""The only home of transformers' model classes: the root module that everything calls, its attention and its head."""
