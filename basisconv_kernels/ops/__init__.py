"""One op a file: its schema, its candidates, its autograd Function and the public function with the contract."""
