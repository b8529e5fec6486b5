"""A web page that asks any OpenAI-compatible server; it needs Gradio, and neither Paddle nor our processors."""
