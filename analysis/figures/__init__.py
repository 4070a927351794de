"""frame → Figure: static, for print and screen; and the frame behind each."""
