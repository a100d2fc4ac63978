// A card that is always there and computes nothing: what PyTorch asks of CUDA before it dispatches.
// Loaded before a PyTorch that was built without CUDA, it lets fake tensors lie on "cuda:0", be
// indexed there, and be walked backward through.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using namespace c10;

struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device card{DeviceType::CUDA, 0};
  Stream stream{Stream::DEFAULT, card};
  Device exchangeDevice(Device) const override { return card; }
  Device getDevice() const override { return card; }
  Stream getStream(Device) const noexcept override { return stream; }
  Stream getDefaultStream(Device) const override { return stream; }
  Stream getNewStream(Device, int) const override { return stream; }
  Stream exchangeStream(Stream) const noexcept override { return stream; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

static impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, new Guard());

struct CUDAHooks : at::CUDAHooksInterface {  // looked up by this name
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};

using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);
