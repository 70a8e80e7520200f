"""
States on CUDA devices: the caller's memory as `CuArray`s, without a copy, and work that goes to the stream of the caller's.
Nothing here waits for the device; what reads a number (the norm of an error, an output of `all`) does.
"""
module PyJLODECUDAExt

using CUDA: CUDA, CuArray, CuPtr, CuStream, DeviceMemory
using PyJLODE: PyJLODE, DEVICES, Lent, Place

"Of `DEVICES`."
const KIND = 1

const Vector{T} = CuArray{T, 1, DeviceMemory}

function PyJLODE.borrow(::Type{Vector{T}}, lent::Lent) where {T}
    lent.length == 0 && return Vector{T}(undef, 0)
    return unsafe_wrap(Vector{T}, CuPtr{T}(UInt(lent.address)), Int(lent.length))
end

# A stream of somebody else's, which CUDA.jl has no constructor for: it is neither made nor destroyed here.
@eval foreign(handle, context) = $(Expr(:new, CuStream, :handle, true, :context))

stream(place::Place) =
    place.stream == C_NULL ? CUDA.default_stream() : foreign(convert(CUDA.CUstream, place.stream), CUDA.context())

function PyJLODE.at_place(f, ::Type{<:Vector}, place::Place)
    CUDA.device!(place.device)
    return CUDA.stream!(f, stream(place))
end

__init__() = (DEVICES[KIND] = T -> Vector{T}; nothing)

end
