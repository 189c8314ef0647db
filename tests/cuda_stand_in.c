// What a call on a CUDA tensor asks of torch, for a torch without CUDA: preloaded under the name of libtorch_cuda.so, so that the
// binding gets as far as this machine's driver. Remembers what it was asked for.
#include <stdint.h>

int32_t stand_in_stream_of = -1, stand_in_guard_of = -1, stand_in_guards = 0;

int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  stand_in_stream_of = device;
  *stream = 0;
  return 0;
}
int32_t aoti_torch_create_device_guard(int32_t device, void** guard) {
  stand_in_guard_of = device;
  ++stand_in_guards;
  *guard = &stand_in_guards;
  return 0;
}
int32_t aoti_torch_delete_device_guard(void* guard) {
  --stand_in_guards;
  return guard != &stand_in_guards;
}
