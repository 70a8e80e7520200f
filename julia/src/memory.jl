# Memory that belongs to someone else, as arrays.

"""
    Borrowed(address, n, owner, T)

`n` numbers at an address, without a copy. `owner` is whatever keeps the memory alive (from Python: the tensor); it is
kept for as long as this is, and the array is handed out by nothing else, so that the one cannot outlive the other.
"""
struct Borrowed{T}
    array::Vector{T}
    owner::Any
end

function Borrowed(address::Integer, n::Integer, owner, ::Type{T}) where {T}
    # The address of an empty tensor is 0, which unsafe_wrap refuses.
    array = n == 0 ? T[] : unsafe_wrap(Array, Ptr{T}(UInt(address)), Int(n))
    return Borrowed{T}(array, owner)
end
