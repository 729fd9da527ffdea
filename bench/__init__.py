"""Speed, measured side by side with the peers in one run. Bars are in the table; tests never assert them."""
