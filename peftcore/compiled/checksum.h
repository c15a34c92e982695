#include <stdint.h>

/* Returns a checksum of the bytes of three parts. */
uint64_t checksum(const uint8_t *first, long first_bytes, const uint8_t *second, long second_bytes,
                  const uint8_t *third, long third_bytes);
